"""Text in a model's own words: what stands for the data that it was made for, where nobody has them.

A model of text goes on from a begin-of-text token (self-replay, arXiv 1909.03329). A chat model is asked for a question
first, by the part of its chat template that stands before one, and then answers it (arXiv 2406.08464): text that begins
nowhere is nothing that such a model was trained on.
"""

import itertools
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.examples import IGNORED, special_ids
from ..data.templates import ChatTemplate
from ..errors import LLMBuilderError
from ..models import context_length, end_ids, generate
from .base import Example

ROWS = 16  # texts made at once
TEMPERATURE = 1.0  # the model's own distribution
TRIES = 8  # rounds without a word before the model counts as one that says nothing
LEAST = 16  # tokens that a question and its answer need

Sample = tuple[list[int], int]
"""Token ids, and the place of the first that is learnt."""


class Texts(Sequence[Example]):
    """Texts as examples, kept flat: ``ids`` [tokens] int32, ``bounds`` [texts + 1] int64, and ``starts`` [texts] int64,
    from where in each text on it is learnt: 0, or where an answer begins."""

    def __init__(self, ids: Tensor, bounds: Tensor, starts: Tensor) -> None:
        self.ids, self.bounds, self.starts = ids, bounds, starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        start, end = self.bounds[index % len(self)], self.bounds[index % len(self) + 1]
        ids, before = self.ids[start:end].tolist(), int(self.starts[index % len(self)])
        return {"input_ids": ids, "labels": [IGNORED] * before + ids[before:]}

    def cut(self, length: int, tokens: int) -> "Texts":
        """The texts, ``length`` tokens of each and ``tokens`` together at most, but for those teaching nothing."""
        kept: list[Sample] = []
        for (start, end), before in zip(itertools.pairwise(self.bounds.tolist()), self.starts.tolist(), strict=True):
            ids = self.ids[start : min(end, start + min(length, tokens))].tolist()
            if _teaches(ids, before):
                kept.append((ids, before))
                tokens -= len(ids)
        return _flat(kept)

    def are_whole(self) -> bool:
        """Whether there are texts, one behind the other, each with something to learn, as ``make_texts`` leaves it."""
        lengths = self.bounds.diff()
        return (
            len(self) == len(lengths) > 0
            and int(self.bounds[0]) == 0
            and int(self.bounds[-1]) == len(self.ids)
            and bool((self.starts >= 0).all() and (lengths > self.starts.clamp(min=1)).all())
        )

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by name."""
        return {"ids": self.ids, "bounds": self.bounds, "starts": self.starts}


def template_of(model: nn.Module, length: int) -> ChatTemplate | None:
    """The model's chat template; None without one, or where it leaves no room for words in ``length`` tokens."""
    tokenizer: Any = getattr(model, "tokenizer", None)
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        template = ChatTemplate(tokenizer)
    except LLMBuilderError:  # it can't write a question and an answer
        return None
    before, between, _ = template.frame
    room = length - len(_ids(tokenizer, "".join(template.frame)))
    return template if before and between and room >= LEAST else None


def make_texts(model: nn.Module, known: int, tokens: int, length: int, seed: int, where: str = "") -> Texts:
    """At most ``tokens`` tokens of text in the model's own words, ``length`` in each text at most; the same for equal
    models, seeds and numbers of threads.

    A text ends before a token that is none of the first ``known``: rows of the embedding that stand for nothing, or
    that a run has just added. Warns, once it knows, how long that takes, and ``where`` the text is kept. Raises
    LLMBuilderError for a model that makes no text.
    """
    length = min(length, context_length(model) or length, tokens)
    rows = min(ROWS, -(-tokens // length))
    generator = torch.Generator().manual_seed(seed)
    kept: list[Sample] = []
    template, made, empty, full, started = template_of(model, length), 0, 0, False, time.perf_counter()
    ends = {*end_ids(model), *range(known, _vocabulary(model))}
    while True:
        before = made
        if template is None:
            samples = _texts(model, known, ends, rows, length, generator)
        else:
            samples = _chats(model, template, ends, rows, length, generator)
        for ids, start in samples:
            text = ids[: tokens - made]
            if _teaches(text, start):
                kept.append((text, start))
                made += len(text)
            full = len(text) < len(ids) or made > tokens - 2
            if full:
                break
        if made and not before:
            _announce(tokens, (time.perf_counter() - started) * tokens / made, where)
        if full:
            return _flat(kept)
        empty += not made
        if empty == TRIES:
            why = "ends its texts before they begin" if template is None else "asks nothing by its chat template"
            raise LLMBuilderError(f"the base model {why}: give a general_dataset")


def known_tokens(model: nn.Module) -> int:
    """How many tokens the model and its tokenizer know."""
    tokenizer: Any = getattr(model, "tokenizer", None)
    return _vocabulary(model) if tokenizer is None else min(_vocabulary(model), len(tokenizer))


def _vocabulary(model: nn.Module) -> int:
    return int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]


def _texts(
    model: nn.Module, known: int, ends: set[int], rows: int, length: int, generator: torch.Generator
) -> Iterator[Sample]:
    """Texts from the tokenizer's begin-of-text token, or from a token drawn at random where there is none."""
    tokenizer: Any = getattr(model, "tokenizer", None)
    first = getattr(tokenizer, "bos_token_id", None)
    special = set() if tokenizer is None else special_ids(tokenizer)
    plain = [token for token in range(known) if token not in special]
    drawn = torch.randint(len(plain), (rows,), generator=generator).tolist()
    starts = [[plain[index] if first is None else first] for index in drawn]
    texts = generate(model, starts, length - 1, TEMPERATURE, stop_ids=ends, generator=generator)
    return ((start + text, 0) for start, text in zip(starts, texts, strict=True))


def _chats(
    model: nn.Module, template: ChatTemplate, ends: set[int], rows: int, length: int, generator: torch.Generator
) -> Iterator[Sample]:
    """Questions that the model asks as the user, a third of the room at most, with its answers: these are learnt, up
    to what ends them."""
    tokenizer: Any = model.tokenizer
    frame = template.frame
    opening, behind = _ids(tokenizer, frame.before), _ids(tokenizer, frame.behind)
    third = (length - len(_ids(tokenizer, "".join(frame)))) // 3
    special = special_ids(tokenizer)
    said = generate(model, [opening] * rows, third, TEMPERATURE, stop_ids=ends | special, generator=generator)
    questions = [_before(frame.between.strip(), tokenizer.decode(ids)).strip() for ids in said]
    asked = [template.prompt([{"role": "user", "content": text}]) for text in questions if text]
    prompts = [_ids(tokenizer, text) for text in asked]
    # What is read again may have a token more; an answer needs room for a few.
    prompts = [prompt for prompt in prompts if length - len(prompt) - len(behind) >= third]
    room = length - len(behind) - max(map(len, prompts), default=0)
    ends = ends | special.intersection(behind)
    answers = generate(model, prompts, room, TEMPERATURE, stop_ids=ends, generator=generator)
    return (
        (prompt + answer + (behind if len(answer) < room else []), len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
    )


def _teaches(ids: list[int], start: int) -> bool:
    """Whether there is something that is learnt, and what it is predicted from."""
    return len(ids) > max(start, 1)


def _before(end: str, text: str) -> str:
    return text.split(end, 1)[0] if end else text


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _flat(samples: list[Sample]) -> Texts:
    bounds = torch.tensor([0, *(len(ids) for ids, _ in samples)]).cumsum(0)
    ids = torch.tensor([token for ids, _ in samples for token in ids], dtype=torch.int32)
    return Texts(ids, bounds, torch.tensor([start for _, start in samples], dtype=torch.int64))


def _announce(tokens: int, seconds: float, where: str) -> None:
    warnings.warn(
        f"no general_dataset: {tokens:,} tokens of text are sampled from the base model itself, which takes about "
        f"{seconds:.0f} s, once; they are kept in {where}",
        stacklevel=5,
    )
