"""Generation: one small loop for native and Hugging Face models."""

import contextlib
import inspect
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LLMBuilderError
from .structure import context_length


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    stop_ids: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Continue each prompt; all together in one batch, padded on the left.

    Args:
        model: a :class:`GPT` or a transformers model; runs in evaluation mode and gets its mode back.
        prompts: token ids, at least one each; lengths may differ.
        max_new_tokens: most tokens to add.
        temperature: 0 takes the likeliest token (the lower id of equals); otherwise tokens are drawn from
            softmax(logits / temperature).
        stop_ids: a continuation ends before the first of these; see :func:`end_ids`.
        generator: CPU generator that the draws come from; torch's own when None.

    Returns:
        The new tokens of each prompt, without the token that ended it. Greedy results are those of each prompt alone,
        up to ties within rounding; sampled ones repeat with the generator's state and the same prompts.

    Raises:
        LLMBuilderError: an empty prompt, a negative temperature or length, a token that the model does not have, prompt
            and new tokens beyond what it is made for, or logits that are not finite.
    """
    if not prompts:
        return []
    _check(model, prompts, max_new_tokens, temperature)
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
    results: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    cache = None
    with _evaluation(model):
        for _ in range(max_new_tokens):
            new = 1 if cache is not None else tokens.shape[1]
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            output = _call(model, tokens[:, -new:], mask, positions[:, -new:], cache)
            cache = getattr(output, "past_key_values", None)
            logits = output.logits[:, -1].float()
            if not logits.amax(-1).isfinite().all():  # minus infinity keeps a token out; the largest must be a number
                raise LLMBuilderError(
                    "generate: the model's logits are not finite: its weights hold nan or too large numbers (training "
                    "diverged, or the dtype is too small for it); load another checkpoint, or the model in fp32"
                )
            chosen = _choose(logits, temperature, generator)
            for row, token in enumerate(chosen.tolist()):
                if row in going and token in stop_ids:
                    going.remove(row)
                elif row in going:
                    results[row].append(token)
            if not going:
                break
            tokens = torch.cat([tokens, chosen[:, None]], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return results


def end_ids(model: nn.Module) -> tuple[int, ...]:
    """The tokens at which the model's text ends: its generation config's, and its tokenizer's end of text."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = list(named) if isinstance(named, (list, tuple)) else [named]
    ids.append(getattr(getattr(model, "tokenizer", None), "eos_token_id", None))
    return tuple(dict.fromkeys(token for token in ids if token is not None))


def _check(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float) -> None:
    if not all(prompts):
        raise LLMBuilderError("generate: a prompt is empty; give at least one token, such as the end-of-text token")
    if temperature < 0 or max_new_tokens < 0:
        raise LLMBuilderError(
            f"generate: temperature and max_new_tokens must not be negative, got {temperature} and {max_new_tokens}"
        )
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    size = getattr(table, "num_embeddings", None)
    strange = [token for prompt in prompts for token in prompt if token < 0 or (size is not None and token >= size)]
    if strange:
        raise LLMBuilderError(
            f"generate: a prompt holds the token {strange[0]}, none of the model's{f' {size}' if size else ''}: "
            "tokenise it with the model's own tokenizer"
        )
    longest, limit = max(len(prompt) for prompt in prompts), context_length(model)
    if limit is not None and longest + max_new_tokens > limit:
        raise LLMBuilderError(
            f"generate: a prompt of {longest} tokens and {max_new_tokens} new ones exceed the {limit} that the model "
            "is made for; shorten the prompt or lower max_new_tokens"
        )


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _call(model: nn.Module, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Any:
    """One forward pass for the last position's logits, with those of the arguments that this architecture takes."""
    arguments = {
        "attention_mask": mask,
        "position_ids": positions,
        "past_key_values": cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    taken = inspect.signature(model.forward).parameters
    return model(tokens, **{name: value for name, value in arguments.items() if name in taken})


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """The next token of each row of logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1).cpu()
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)
