"""Several tasks at once: their losses weighed, and what each has of its own."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..data import MultiTaskDataset
from ..errors import ConfigError, no_such_task
from ..nn import LanguageHead, LoRAConfig, add_lora, list_adapters, save_adapter
from ..nn.tasks import add_heads, find_heads, use_head
from ..nn.tree import shares_of, state_of, wrappers
from .base import Batch, Key, Run
from .lora import go_on_with


class TaskAdapters:
    """One adapter for each task, named as the task, and nothing else trains; a run that goes on trains those there are,
    and keeps those of tasks that are not its own.

    Args:
        config: rank, alpha, dropout, target modules and what else each adapter has.

    Raises:
        ConfigError: in a run that goes on, an adapter that is not what ``config`` asks for, or none of its tasks'.
    """

    name = "task adapters"

    def __init__(self, config: LoRAConfig) -> None:
        self.config = config

    def prepare(self, run: Run) -> None:
        there, own = list_adapters(run.model), sorted(tasks_of(run).tasks)  # as a folder lists them
        if there and not there.keys() & {*own}:
            raise ConfigError(
                f"the model has the adapter {', '.join(there)}, which is of none of the tasks {', '.join(own)}: go on "
                "with shared_encoder=True, or name the tasks as the earlier run did"
            )
        for task in own:
            if task in there:
                go_on_with(run.model, task, self.config)
            else:
                add_lora(run.model, self.config, task)
        for wrapper in wrappers(run.model):
            for task, share in shares_of(wrapper).items():
                share.requires_grad_(task in own)

    def export(self, model: nn.Module, folder: Path) -> None:
        for task in state_of(model).configs:
            save_adapter(model, folder / "adapters" / task, task)


class MultiTask:
    """The loss of a step is Σ weight · mean loss over the task's targets in it. Examples of other sources (general,
    replayed) count as one more task of weight 1, which has nothing of its own.

    Args:
        weights: of each task's loss; 1 where none is given.
        heads: each task gets an output head of its own, which starts as the model's and trains whole.
        adapters: each task has an adapter of its own (:class:`TaskAdapters`).

    Raises:
        ConfigError: training data that name no tasks, or a weight for a task that is not there.
    """

    name = "multi task"

    def __init__(self, weights: Mapping[str, float], heads: bool, adapters: bool) -> None:
        self.weights = weights
        self.heads = heads
        self.adapters = adapters

    def prepare(self, run: Run) -> None:
        self._tasks = tasks_of(run)
        self._model = run.model
        for name in self.weights:
            self._check(name, "task_weights")
        if self.heads:
            there, wanted = find_heads(run.model), sorted(self._tasks.tasks)  # as a file lists them
            if there is not None and sorted(there.tasks) != wanted:
                raise ConfigError(
                    f"the model has heads for {there.tasks}, and the data are of {wanted}: name the same tasks"
                )
            (there or add_heads(run.model, wanted)).heads.requires_grad_(True)
        self._head = LanguageHead(run.model)

    def split(self, batch: Batch) -> Iterator[Batch]:
        for task in dict.fromkeys(map(self._task, batch.keys)):
            part = self._rows(batch, task)
            if part is not None:
                with self._serving(task):
                    yield part

    def loss(self, model: nn.Module, batch: Batch, window: Sequence[Batch]) -> Tensor:
        task = self._task(batch.keys[0])
        parts = [self._rows(each, task) for each in window]
        targets = sum(part.targets for part in parts if part is not None)
        weight = 1.0 if task is None else self.weights.get(task, 1.0)
        return weight * self._head.loss_sum(batch.tensors)[0] / max(targets, 1)

    def parts(self, dataset: Any) -> Iterator[Any]:
        if not hasattr(dataset, "tasks"):
            if self.heads or self.adapters:
                warnings.warn("data without tasks are judged by what no task has of its own", stacklevel=3)
            with self._serving(None):
                yield dataset
            return
        for task, part in dataset.tasks.items():
            self._check(task, "the data to judge by")
            with self._serving(task):
                yield part

    def _rows(self, batch: Batch, task: str | None) -> Batch | None:
        return batch.where(lambda key: self._task(key) == task)

    def _task(self, key: Key) -> str | None:
        """The task of an example of the training data; None for those of other sources."""
        source, index = key
        return self._tasks.task_of(index) if source == "train" else None

    def _check(self, task: str, where: str) -> None:
        if task not in self._tasks.tasks:
            raise ConfigError(no_such_task(where, task, self._tasks.tasks))

    @contextmanager
    def _serving(self, task: str | None) -> Iterator[None]:
        """The model with what the task has of its own."""
        self._switch(task)
        try:
            yield
        finally:
            self._switch(None)

    def _switch(self, task: str | None) -> None:
        if self.heads:
            use_head(self._model, task)
        if self.adapters:
            state_of(self._model).active = {} if task is None else {task: 1.0}


def tasks_of(run: Run) -> MultiTaskDataset:
    """The training data of a run as tasks. Raises ConfigError where they name none."""
    data = run.sources["train"]
    if not isinstance(data, MultiTaskDataset):
        raise ConfigError("multi_task=True needs a MultiTaskDataset: it names the tasks")
    return data
