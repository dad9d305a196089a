"""Domain adaptation: examples of the domain and general ones, in exact shares."""

import random
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import count, islice
from typing import Any

from .base import Key, Run
from .general import SOURCE


class Domain:
    """Draws the examples of batches from the training data and from the general ones (source ``"general"``).

    After n examples of the run, ⌊n · weight + ½⌋ of them came from the training data: the remainder is carried from
    batch to batch and from epoch to epoch. An epoch is as long as it takes to go through the training data once; to
    keep the shares exact it may leave out its last example, or begin it again. General examples come in an order that
    the seed fixes, each once before any comes again.

    Args:
        weight: share of the training data, in (0, 1].
        label: what the domain is called, for the results.
    """

    name = "domain"

    def __init__(self, weight: float, label: str | None = None) -> None:
        self.weight = Fraction(str(weight))  # as written: products of it are exact
        self.label = label

    def prepare(self, run: Run) -> None:
        self.seed, self.batch_size = run.seed, run.batch_size
        self._general = run.sources.get(SOURCE, ())  # a checkpoint may bring another text than was sampled now

    def batches(self, epoch: int, plan: Iterable[list[Key]]) -> Iterable[list[Key]]:
        plan = list(plan)
        domain = [key for keys in plan for key in keys]
        size = self.batch_size  # the first batch of a plan may be a short one
        length = max(1, round(len(domain) / self.weight))
        keys = list(self._mixed(domain, epoch * length, length))
        return [keys[start : start + size] for start in range(0, length, size)]

    def results(self) -> dict[str, Any]:
        return {"domain": self.label}

    def _mixed(self, domain: Sequence[Key], first: int, length: int) -> Iterator[Key]:
        """The examples number ``first`` to ``first + length`` of the run."""
        general = _shuffles(len(self._general), self.seed)
        start = self._of_domain(first)
        general = islice(general, first - start, None)
        for n in range(first, first + length):
            index = self._of_domain(n)
            if self._of_domain(n + 1) > index:
                yield domain[(index - start) % len(domain)]
            else:
                yield SOURCE, next(general)

    def _of_domain(self, n: int) -> int:
        """How many of the first n examples are of the domain."""
        return int(n * self.weight + Fraction(1, 2))


def _shuffles(size: int, seed: int) -> Iterator[int]:
    """0 to size - 1 in one order after another, without end."""
    for turn in count():
        order = list(range(size))
        random.Random(f"{seed}/general/{turn}").shuffle(order)
        yield from order
