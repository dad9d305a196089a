"""Gradual unfreezing: the last blocks train first (ULMFiT, arXiv 1801.06146)."""

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..models import blocks, embeddings
from .base import Run

ALL = -1


class Progressive:
    """From epoch to epoch more blocks train, from the last one down; comes after the methods that chose what trains.

    Head and final norm always train, and so does, with a warning, an embedding that shares the head's weight. An
    embedding of its own trains once everything does. What other methods froze stays frozen. A weight that does not
    train yet is neither moved nor decayed, and its optimizer state starts clean.

    Args:
        schedule: (epoch, n) in rising order, from epoch 0 on: the last n blocks train from that epoch; -1: everything.

    Raises:
        ConfigError: more blocks than the model has, or an epoch in which nothing would train.
    """

    name = "progressive"

    def __init__(self, schedule: Sequence[tuple[int, int]]) -> None:
        self.schedule = [*schedule]

    def prepare(self, run: Run) -> None:
        model: Any = run.model
        stack = [block for _, block in blocks(model)]
        most = max(count for _, count in self.schedule)
        if most > len(stack):
            raise ConfigError(f"unfreeze_schedule frees {most} blocks, and {type(model).__name__} has {len(stack)}")
        self._everything = [weight for weight in model.parameters() if weight.requires_grad]
        head = model.get_output_embeddings()
        tables = [model.get_input_embeddings(), *(table for _, table in embeddings(model))]
        in_head = _ids([] if head is None else [head])
        if in_head & _ids(tables) & {id(weight) for weight in self._everything}:
            warnings.warn("the embedding trains from the start: it shares the head's weight", stacklevel=2)
        self._blocks = [_ids([block]) for block in stack]
        self._late = _ids(tables) - in_head
        for epoch, _ in self.schedule:
            if not any(self._trains(weight, epoch) for weight in self._everything):
                raise ConfigError(f"unfreeze_schedule: nothing would train in epoch {epoch}: free more blocks")

    def start_epoch(self, epoch: int) -> None:
        for weight in self._everything:
            weight.requires_grad_(self._trains(weight, epoch))

    def after_task(self, run: Run) -> None:
        """Methods that look back on the task do so by all weights."""
        for weight in self._everything:
            weight.requires_grad_(True)

    def _trains(self, weight: nn.Parameter, epoch: int) -> bool:
        count = [count for start, count in self.schedule if start <= epoch][-1]
        if count == ALL:
            return True
        waiting = [*self._blocks[: len(self._blocks) - count], self._late]
        return not any(id(weight) in part for part in waiting)


def _ids(modules: Sequence[nn.Module]) -> set[int]:
    """Which weights some modules hold."""
    return {id(weight) for module in modules for weight in module.parameters()}
