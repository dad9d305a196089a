"""Several tasks as one data set, mixed by share."""

import random
from collections.abc import Sequence
from fractions import Fraction
from math import ceil
from typing import Any

from ..errors import ConfigError, LLMBuilderError, no_such_task
from .examples import Example, GenerationPair, Tokenizer
from .report import DataReport
from .split import split


class MultiTaskDataset:
    """The examples of several tasks, in exact shares and an order that the seed fixes.

    It is long enough for every task to be seen whole; the examples of tasks that have too few for their share come
    several times, each as often as any other of its task, give or take one. The shares hold from the start: each item
    is of the task that is furthest behind its own.

    Args:
        tasks: (name, data set, share) of each: a data set of this package or any sequence of examples; shares are
            positive numbers, and are divided by their sum.
        seed: fixes the order.

    Raises:
        ConfigError: no task, a name given twice or empty, or a share that is not positive.
    """

    task_type = "multi_task"

    def __init__(self, tasks: Sequence[tuple[str, Any, float | Fraction]], seed: int = 0) -> None:
        names = [name for name, _, _ in tasks]
        if not tasks or len(set(names)) < len(names) or not all(names):
            raise ConfigError(f"MultiTaskDataset needs tasks of different names, got {names}")
        wrong = [f"{name}: {share}" for name, _, share in tasks if not share > 0]
        if wrong:
            raise ConfigError(f"MultiTaskDataset: shares must be positive, got {', '.join(wrong)}")
        total = sum(Fraction(str(share)) for _, _, share in tasks)
        self.tasks: dict[str, Any] = {name: data for name, data, _ in tasks}
        self.shares = {name: Fraction(str(share)) / total for name, _, share in tasks}
        self.seed = seed
        self._items: list[tuple[str, int]] | None = None

    def bind(self, tokenizer: Tokenizer, config: Any) -> None:
        """Bind every task's data set; sequences of examples are taken as they are."""
        for data in self.tasks.values():
            if hasattr(data, "bind"):
                data.bind(tokenizer, config)
        self._items = None

    def part(self, task: str) -> Any:
        """The data set of one task. Raises ConfigError for a name that is none."""
        if task not in self.tasks:
            raise ConfigError(no_such_task("the data", task, self.tasks))
        return self.tasks[task]

    @property
    def metric(self) -> str:
        """``exact_match`` where it is every task's, else ``next_token``."""
        metrics = {getattr(data, "metric", "next_token") for data in self.tasks.values()}
        return metrics.pop() if len(metrics) == 1 else "next_token"

    @property
    def report(self) -> DataReport:
        """What was read, over all tasks; the notes have each task's own."""
        reports = {name: data.report for name, data in self.tasks.items() if hasattr(data, "report")}
        total = DataReport(f"{len(self.tasks)} tasks ({', '.join(self.tasks)})")
        for count in ("rows", "kept", "examples", "tokens", "targets"):
            setattr(total, count, sum(getattr(report, count) for report in reports.values()))
        total.notes = [f"Task {name}: {report}".rstrip(".") for name, report in reports.items()]
        return total

    def __len__(self) -> int:
        return len(self._order())

    def __getitem__(self, index: int) -> Example:
        name, own = self._order()[index]
        example: Example = self.tasks[name][own]
        return example

    def task_of(self, index: int) -> str:
        """The task of an item."""
        return self._order()[index][0]

    def generation_pair(self, index: int) -> GenerationPair | None:
        """The pair of one item, where its task's data set makes any."""
        name, own = self._order()[index]
        make = getattr(self.tasks[name], "generation_pair", None)
        pair: GenerationPair | None = make(own) if make else None
        return pair

    def generation_pairs(self, limit: int) -> list[GenerationPair]:
        """The first pairs of each task, in equal numbers."""
        each = max(1, limit // len(self.tasks))
        makers = [getattr(data, "generation_pairs", None) for data in self.tasks.values()]
        return [pair for make in makers if make for pair in make(each)][:limit]

    def split(self, fraction: float, seed: int) -> tuple["MultiTaskDataset", "MultiTaskDataset"]:
        """Training and validation part, task by task, so that no example is in both."""
        plain = [name for name, data in self.tasks.items() if not hasattr(data, "task_type")]
        if plain:
            raise ConfigError(f"to be split, {', '.join(plain)} should be data sets of llmbuilder.data")
        parts = {name: split(data, fraction, seed) for name, data in self.tasks.items()}
        first, second = (
            MultiTaskDataset([(name, parts[name][side], share) for name, share in self.shares.items()], self.seed)
            for side in (0, 1)
        )
        return first, second

    def _order(self) -> list[tuple[str, int]]:
        """(task, index in it) of each item."""
        if self._items is None:
            sizes = {name: len(data) for name, data in self.tasks.items()}
            empty = [name for name, size in sizes.items() if not size]
            if empty:
                raise LLMBuilderError(f"MultiTaskDataset: {', '.join(empty)} has no examples")
            length = max(ceil(size / self.shares[name]) for name, size in sizes.items())
            draws = {name: _Draws(size, f"{self.seed}/{name}") for name, size in sizes.items()}
            self._items = [(name, draws[name].next()) for name in _interleaved(self.shares, length)]
        return self._items


class _Draws:
    """The numbers below ``size`` in one random order after another."""

    def __init__(self, size: int, seed: str) -> None:
        self.size, self.random = size, random.Random(seed)
        self.left: list[int] = []

    def next(self) -> int:
        if not self.left:
            self.left = self.random.sample(range(self.size), self.size)
        return self.left.pop()


def _interleaved(shares: dict[str, Fraction], length: int) -> list[str]:
    """Task names, each time the one that is furthest behind its share."""
    given = dict.fromkeys(shares, 0)
    order = []
    for n in range(1, length + 1):
        name = max(shares, key=lambda task: shares[task] * n - given[task])
        given[name] += 1
        order.append(name)
    return order
