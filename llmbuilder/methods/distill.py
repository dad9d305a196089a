"""Keep general knowledge: on general examples stay close to what the base model says (arXiv 1606.09282)."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from ..models import weights_digest
from ..nn import LanguageHead, adapters_disabled, list_adapters
from .base import Batch, Key, Run
from .general import SOURCE


class GeneralKnowledge:
    """Adds KL(base || tuned) on the general examples of a batch, the mean over the step's general targets.

    The base's distribution comes from the frozen weights: with adapters the same model with its adapters off, which
    costs a forward pass and no memory; where all weights train, a frozen copy of the model, of those that train in fp32
    as they do.

    Raises ConfigError on resume where the copy is of another model than the run had.
    """

    name = "general knowledge"

    def prepare(self, run: Run) -> None:
        model = run.model
        self._head = self._base = LanguageHead(model)
        self._switched: Callable[[], AbstractContextManager[None]] = lambda: adapters_disabled(model)
        if not list_adapters(model):
            self._base, self._switched = LanguageHead(_frozen_copy(model)), nullcontext
        self._digest = weights_digest(self._base.model.named_parameters()) if self._base is not self._head else None

    def state(self) -> dict[str, Any]:
        return {"base": self._digest}

    def load_state(self, state: dict[str, Any]) -> None:
        if state.get("base") != self._digest:
            raise ConfigError("the checkpoint was made with another base model: resume with the model it had")

    def extra_loss(self, model: nn.Module, batch: Batch, window: Sequence[Batch]) -> Tensor | None:
        part = batch.where(_is_general)
        if part is None or not part.targets:
            return None
        parts = [other.where(_is_general) for other in window]
        total = sum(other.targets for other in parts if other is not None)
        return self._head.divergence_sum(part.tensors, self._base, self._switched) / total


def _frozen_copy(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    for weight in copied.parameters():
        weight.data = weight.data.float() if weight.requires_grad else weight.data
    return copied.requires_grad_(False)


def _is_general(key: Key) -> bool:
    return key[0] == SOURCE
