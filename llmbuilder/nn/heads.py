"""The loss of a causal language model without its logits: hidden states go straight to the fused cross-entropy.

A model ends in an output layer (``get_output_embeddings()``). For one call its forward is replaced by one that records
the hidden states and answers with logits of width zero; the states of positions that have a target then go, with the
layer's weight, bias and soft cap, to ``ops.linear_cross_entropy``.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import LLMBuilderError
from ..ops.cross_entropy import chunk_rows, linear_cross_entropy, score_tokens

IGNORED = -100


class LanguageHead:
    """Next-token loss and accuracy of any causal language model, by whichever way is lean and right for it.

    Args:
        model: ``forward(input_ids, attention_mask=None, position_ids=None, ...)`` returning an object with ``.logits``;
            a Hugging Face model, the native GPT, or either with adapters of this package or of PEFT.

    A batch holds ``input_ids`` [B, T], ``labels`` [B, T] (the token at the same position, -100 where it is not learnt;
    the shift happens here: position t predicts label t + 1), and what else the model's forward takes:
    ``attention_mask`` ([B, T] of 0 and 1, or [B, 1, T, T] boolean with True = may attend) and ``position_ids``. It may
    also hold ``weights`` [B, T] float32, the factor of the loss of the label at the same position.

    Ways, chosen at the first call by a probe that costs a forward pass of two tokens:

    * an output layer that is a plain ``nn.Linear``: the fused cross-entropy;
    * any other module (with LoRA of its own, say): chunks of positions through the module, recomputed in backward;
    * a model that does more with its head's output than a soft cap it names, or names no head: its own logits, and a
      warning that says so.

    Gradients reach the head's weight where it trains, tied or not. Only the cross-entropy is computed: what a
    mixture-of-experts model would add (a router's balancing loss) is not. The model runs in the mode (train, eval) and
    the autocast that the caller has set.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def loss_sum(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """The summed cross-entropy of a batch, weighted where it has weights: a float32 scalar with its gradient; and
        the number of targets."""
        states, targets = self.target_states(batch)
        factors = batch["weights"][:, 1:][batch["labels"][:, 1:] != IGNORED] if "weights" in batch else None
        head = self._plain_head()
        if head is not None:
            total = linear_cross_entropy(
                *(states, head.weight, targets, head.bias, self._softcap), reduction="sum", row_weights=factors
            )
            return total, len(targets)
        total = states.new_zeros((), dtype=torch.float32)
        factors = torch.ones_like(targets, dtype=torch.float32) if factors is None else factors
        for chunk, wanted, factor in self._chunks(states, targets, factors):
            total = total + checkpoint(self._chunk_loss, chunk, wanted, factor, use_reentrant=False)
        return total, len(targets)

    def divergence_sum(
        self, batch: Mapping[str, Tensor], base: "LanguageHead", switched: Callable[[], AbstractContextManager[Any]]
    ) -> Tensor:
        """KL(base || model) in nats, summed over the positions that predict a target; a float32 scalar.

        Args:
            batch: as elsewhere; of ``labels`` it only matters where there are any.
            base: what to stay close to: evaluated without gradients, in evaluation mode.
            switched: a context in which ``base`` computes what it should, for a base that is the same model.
        """
        with torch.no_grad(), _undisturbed(base.model), switched():
            base_states, _ = base.target_states(batch)
        states, _ = self.target_states(batch)

        def divergence(states: Tensor, base_states: Tensor) -> Tensor:
            with torch.no_grad(), switched():
                wanted = base._project(base_states).log_softmax(-1)
            return F.kl_div(self._project(states).log_softmax(-1), wanted, reduction="sum", log_target=True)

        total = states.new_zeros((), dtype=torch.float32)
        for chunk, base_chunk in self._chunks(states, base_states):
            total = total + checkpoint(divergence, chunk, base_chunk, use_reentrant=False)
        return total

    @torch.no_grad()
    def score(self, batch: Mapping[str, Tensor]) -> tuple[float, int, int]:
        """(summed cross-entropy, targets that are the most likely token, targets), without gradients."""
        states, targets = self.target_states(batch)
        head = self._plain_head()
        if head is not None:
            losses, best = score_tokens(states, head.weight, targets, head.bias, self._softcap)
            return float(losses.sum(dtype=torch.float64)), int((best == targets).sum()), len(targets)
        loss, correct = 0.0, 0
        for chunk, wanted in self._chunks(states, targets):
            logits = self._project(chunk)
            loss += float(F.cross_entropy(logits, wanted, reduction="sum"))
            correct += int((logits.argmax(-1) == wanted).sum())
        return loss, correct, len(targets)

    def target_logits(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """float32 logits [n, V] for each target, and the targets [n]; with gradients, and the memory that takes."""
        states, targets = self.target_states(batch)
        return self._project(states), targets

    def target_states(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What predicts each target, [n, K], and the targets, [n]: hidden states, or logits where the probe failed.

        Raises LLMBuilderError for a packed batch (a 4D ``attention_mask``) that the model can't keep apart.
        """
        mask = batch.get("attention_mask")
        if mask is not None and mask.dim() == 4 and self._packing_problem is not None:
            raise LLMBuilderError(
                f"{type(self.model).__name__} can't train on packed examples: {self._packing_problem}; "
                "use data_collator='default'"
            )
        return self._target_states(batch)

    def _target_states(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        inputs: dict[str, Any] = {name: value for name, value in batch.items() if name not in ("labels", "weights")}
        inputs |= _no_cache(self.model)
        if (mask := inputs.get("attention_mask")) is not None and mask.dim() == 4:
            inputs["attention_mask"] = _packing_mask(self.model, mask)
        head = self._head
        if head is None:
            states = self.model(**inputs).logits
        else:
            with _recording(head, _no_logits) as seen:
                self.model(**inputs)
            states = seen[-1]
        labels = batch["labels"]
        if states.shape[:-1] != labels.shape:
            raise LLMBuilderError(
                f"the model computes positions {[*states.shape[:-1]]} for labels of shape {[*labels.shape]}; "
                "models that add positions of their own (prompt tuning) are not supported"
            )
        following = labels[:, 1:]
        kept = following != IGNORED
        return states[:, :-1][kept], following[kept]

    def _plain_head(self) -> nn.Linear | None:
        """The output layer where it is nothing but a product with a weight."""
        head = self._head
        return head if type(head) is nn.Linear else None

    @property
    def _head(self) -> nn.Module | None:
        """The output layer that is intercepted; None where the model's own logits are used."""
        return _output_layer(self.model) if self._is_interceptable else None

    @property
    def _softcap(self) -> float | None:
        return getattr(_text_config(self.model), "final_logit_softcapping", None)

    def _project(self, states: Tensor) -> Tensor:
        """float32 logits of some rows, where no plain head serves."""
        head = self._head
        logits = states if head is None else _capped(head(states), self._softcap)
        return logits.float()

    def _chunk_loss(self, states: Tensor, targets: Tensor, factors: Tensor) -> Tensor:
        return (factors * F.cross_entropy(self._project(states), targets, reduction="none")).sum()

    def _chunks(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The same rows of several tensors, as many as may have logits at once."""
        rows = chunk_rows(_text_config(self.model).vocab_size, torch.float32)
        return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)

    @cached_property
    def _is_interceptable(self) -> bool:
        """Whether the model's logits are the head's output, soft-capped as the config says; a warning where not."""
        reason = self._probe()
        if reason is not None:
            warnings.warn(
                f"{type(self.model).__name__}: {reason}; the loss is computed from whole logits, which takes more "
                "memory and time",
                stacklevel=2,
            )
        return reason is None

    @torch.no_grad()
    def _probe(self) -> str | None:
        """Why not: the model gets made-up logits from its head, and its own must be these, soft-capped."""
        head = _output_layer(self.model)
        if head is None:
            return "it has no output embeddings"
        made_up: list[Tensor] = []

        def answer(hidden: Tensor) -> Tensor:
            like = type(head).forward(head, hidden)
            values = torch.randn(like.shape, generator=torch.Generator().manual_seed(len(made_up)))
            made_up.append((10 * values).to(like))
            return made_up[-1]

        tokens = torch.zeros(1, 2, dtype=torch.int64, device=next(self.model.parameters()).device)
        with _undisturbed(self.model), _recording(head, answer):
            logits = self.model(input_ids=tokens, **_no_cache(self.model)).logits
        if len(made_up) != 1:
            return f"its output layer runs {len(made_up)} times in a forward pass"
        expected = _capped(made_up[0], self._softcap)
        tolerance = 4 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
        if logits.shape != expected.shape or not torch.allclose(logits.float(), expected.float(), 0, tolerance):
            return "its logits are not the output of its output layer"
        return None

    @cached_property
    def _packing_problem(self) -> str | None:
        """Why packed examples would disturb each other: a short one must come out behind another as it does alone.

        Recurrent and convolutional layers carry the first one's tokens over, whatever the mask says.
        """
        device = next(self.model.parameters()).device
        document = (torch.arange(3, 7, device=device) % _text_config(self.model).vocab_size)[None]
        row = torch.cat([document[:, 1:].flip(1), document], 1)
        first = row.shape[1] - document.shape[1]
        index = torch.arange(row.shape[1], device=device)
        second = index >= first
        apart = {"input_ids": document, "labels": document, "attention_mask": torch.ones_like(document)}
        packed = {
            "input_ids": row,
            "labels": row.masked_fill(index <= first, IGNORED),
            "attention_mask": (second[:, None] == second).tril()[None, None],
            "position_ids": torch.where(second, index - first, index)[None],
        }
        with torch.no_grad(), _undisturbed(self.model):
            alone, _ = self._target_states(apart)
            try:
                behind, _ = self._target_states(packed)
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                return f"it takes no mask of pairs of tokens ({str(error).splitlines()[0]})"
        difference = float((behind.float() - alone.float()).norm() / alone.float().norm())
        # Far above rounding, also that of many layers, and far below what another token does in a trained model.
        return None if difference <= torch.finfo(alone.dtype).eps ** 0.5 else "an example changes the one behind it"


def _output_layer(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    layer: Any = get() if callable(get) else None
    while hasattr(type(layer), "serving"):  # of several copies, heads of tasks or of adapters, the one that serves
        layer = layer.serving()
    return layer


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _no_cache(model: nn.Module) -> dict[str, bool]:
    """Keys and values are kept for generation only; transformers' models keep them unless told."""
    return {"use_cache": False} if hasattr(model.config, "get_text_config") else {}


def _no_logits(hidden: Tensor) -> Tensor:
    return hidden.new_empty(*hidden.shape[:-1], 0)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@contextmanager
def _recording(head: nn.Module, answer: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """While open, this one module's forward records its input and returns ``answer`` of it."""
    seen: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return answer(hidden)

    attributes = vars(head)  # where an instance's own forward hides the class's
    before = attributes.get("forward")
    attributes["forward"] = forward
    try:
        yield seen
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """In eval mode while open; afterwards every module is in the mode it was in, and random states are as before."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _packing_mask(model: nn.Module, mask: Tensor) -> Tensor | dict[str, Tensor]:
    """A [B, 1, T, T] boolean mask as the model takes it.

    transformers uses a 4D mask as it stands: eager attention adds it to the scores, so there it becomes 0 and -inf's
    stand-in; and layers with a sliding window need the window cut into it.
    """
    config = _text_config(model)
    if not hasattr(config, "_attn_implementation"):
        return mask

    def ready(visible: Tensor) -> Tensor:
        if config._attn_implementation != "eager":
            return visible
        return torch.zeros(visible.shape, dtype=torch.float32, device=mask.device).masked_fill_(
            ~visible, torch.finfo(torch.float32).min
        )

    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and chunk < mask.shape[-1]:
        raise LLMBuilderError(
            f"{type(model).__name__} attends in chunks of {chunk} tokens, which packed rows of {mask.shape[-1]} "
            "exceed: lower max_seq_length, or use data_collator='default'"
        )
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if window is None or window >= mask.shape[-1] or kinds == {"full_attention"}:
        return ready(mask)
    position = torch.arange(mask.shape[-1], device=mask.device)
    near = ready(mask & (position[:, None] - position < window))
    return {"full_attention": ready(mask), "sliding_attention": near} if "full_attention" in kinds else near
