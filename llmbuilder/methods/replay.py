"""Replay: a sample of earlier tasks' examples comes again among the new ones (arXiv 1902.10486)."""

import random
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import count, islice
from typing import Any

import torch

from .base import Example, Key, Run

SOURCE = "replay"


class Replay:
    """Keeps examples of earlier tasks, and draws a share of each task's examples from them.

    After each task every example of its training data is offered to a buffer that keeps a uniform sample of all that
    it was ever offered (reservoir sampling, Vitter 1985, algorithm R). Once it is not empty, ⌊ρn + ½⌋ of the first n
    examples of a run come from it: the remainder is carried from batch to batch and from epoch to epoch. They come in
    an order that the seed fixes, each once before any comes again. An epoch is as long as it takes to go through the
    other examples once; to keep the share exact it may leave out its last example, or begin it again.

    Args:
        size: most examples to keep. Where an earlier run kept more, a uniform sample of them stays; where it kept
            fewer, the places that are new go to the first examples of the task, and the sample is not uniform.
        frequency: ρ, in (0, 1).
    """

    name = "replay"

    def __init__(self, size: int, frequency: float) -> None:
        self.size, self.frequency = size, Fraction(str(frequency))  # as written: products of it are exact
        self.examples: list[Example] = []
        self.offered = 0
        """Examples of all earlier tasks."""

    def prepare(self, run: Run) -> None:
        self._seed, self._batch_size = run.seed, run.batch_size
        if len(self.examples) > self.size:  # an earlier run kept more
            draw = random.Random(f"{run.seed}/smaller/{self.offered}")
            self.examples[:] = draw.sample(self.examples, self.size)
        if self.examples:
            run.sources[SOURCE] = self.examples

    def batches(self, epoch: int, plan: Iterable[list[Key]]) -> Iterable[list[Key]]:
        plan = list(plan)
        if not self.examples:
            return plan
        others = [key for keys in plan for key in keys]
        length = max(1, round(len(others) / (1 - self.frequency)))
        keys = list(self._mixed(others, epoch * length, length))
        size = self._batch_size  # the first batch of a plan may be a short one
        return [keys[start : start + size] for start in range(0, length, size)]

    def after_task(self, run: Run) -> None:
        """Offer the buffer every example of the task."""
        data = run.sources["train"]
        draw = random.Random(f"{run.seed}/reservoir/{self.offered}")
        kept = list(self.examples)  # a run's batches draw from the old list
        for index in range(len(data)):
            place = len(kept) if len(kept) < self.size else draw.randrange(self.offered + 1)
            self.offered += 1
            if place < self.size:
                kept[place : place + 1] = [_plain(data[index])]
        self.examples = kept

    def state(self) -> dict[str, Any]:
        return {"examples": self.examples, "offered": self.offered}

    def load_state(self, state: dict[str, Any]) -> None:
        self.examples[:] = state["examples"]
        self.offered = state["offered"]

    past, load_past = state, load_state

    def _mixed(self, others: list[Key], first: int, length: int) -> Iterator[Key]:
        """The examples number ``first`` to ``first + length`` of the run."""
        start = first - self._replayed(first)
        replayed = islice(_shuffles(len(self.examples), self._seed), self._replayed(first), None)
        for n in range(first, first + length):
            before = self._replayed(n)
            if self._replayed(n + 1) > before:
                yield SOURCE, next(replayed)
            else:
                yield others[(n - before - start) % len(others)]

    def _replayed(self, n: int) -> int:
        """How many of the first n examples come from the buffer."""
        return int(n * self.frequency + Fraction(1, 2))


def _plain(example: Example) -> Example:
    """What a batch is made of, in lists of numbers that JSON can hold; examples may be arrays or tensors."""
    names = [name for name in ("input_ids", "labels", "weights") if name in example]
    return {name: torch.as_tensor(example[name]).tolist() for name in names}


def _shuffles(size: int, seed: int) -> Iterator[int]:
    """0 to size - 1 in one order after another, without end."""
    for turn in count():
        order = list(range(size))
        random.Random(f"{seed}/replay/{turn}").shuffle(order)
        yield from order
