"""Keep general knowledge: on general examples stay close to what the base model says (arXiv 1606.09282)."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from ..nn import LanguageHead, adapters_disabled, list_adapters
from .base import Batch, Key, Run
from .general import SOURCE


class GeneralKnowledge:
    """Adds KL(base || tuned) on the general examples of a batch, the mean over the step's general targets.

    The base's distribution comes from the frozen weights: with adapters the same model with its adapters off, which
    costs a forward pass and no memory; where all weights train, a frozen copy of the model.
    """

    name = "general knowledge"

    def prepare(self, run: Run) -> None:
        model = run.model
        self._head = self._base = LanguageHead(model)
        self._switched: Callable[[], AbstractContextManager[None]] = lambda: adapters_disabled(model)
        if not list_adapters(model):
            self._base, self._switched = LanguageHead(copy.deepcopy(model).requires_grad_(False)), nullcontext

    def extra_loss(self, model: nn.Module, batch: Batch, window: Sequence[Batch]) -> Tensor | None:
        part = batch.where(_is_general)
        if part is None or not part.targets:
            return None
        parts = [other.where(_is_general) for other in window]
        total = sum(other.targets for other in parts if other is not None)
        return self._head.divergence_sum(part.tensors, self._base, self._switched) / total


def _is_general(key: Key) -> bool:
    return key[0] == SOURCE
