"""A dataset in two, without copies."""

import random
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError, LLMBuilderError
from .examples import Dataset, Example, GenerationPair, Tokenizer, collect_pairs
from .report import DataReport


class DatasetView:
    """Some examples of a dataset, by index, in the order of ``indices``. Report, task and metric are the dataset's."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]) -> None:
        self._dataset = dataset
        self._indices = list(indices)
        self._size = len(dataset)
        self.task_type = dataset.task_type
        self.metric = dataset.metric

    def bind(self, tokenizer: Tokenizer, config: Any) -> None:
        """Bind the dataset that this is a part of; refused when that would change its number of examples."""
        self._dataset.bind(tokenizer, config)
        if len(self._dataset) != self._size:
            raise LLMBuilderError(
                f"the dataset had {self._size} examples when it was split and has {len(self._dataset)} with these "
                "settings: bind it before it is split"
            )

    @property
    def report(self) -> DataReport:
        """The report on the whole dataset."""
        return self._dataset.report

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._dataset[self._indices[index]]

    def generation_pair(self, index: int) -> GenerationPair | None:
        """The pair of one example of this part."""
        return self._dataset.generation_pair(self._indices[index])

    def generation_pairs(self, limit: int) -> list[GenerationPair]:
        """The first ``limit`` pairs of this part."""
        return collect_pairs(self, limit)


def split(dataset: Dataset, fraction: float, seed: int) -> tuple[DatasetView, DatasetView]:
    """A part to train on and a part to validate with, drawn at random.

    Args:
        dataset: bound, so that its examples are known.
        fraction: share of the validation part, in (0, 1). Of n examples it gets ``⌊fraction·n + ½⌋``, but at least 1
            and at most n − 1.
        seed: the same seed and number of examples give the same parts.

    Returns:
        (train, validation), each in the dataset's order; together they hold each example once. Of several tasks, each
        is divided by itself.

    Raises:
        ConfigError: ``fraction`` not between 0 and 1.
        LLMBuilderError: fewer than two examples.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"validation_split must lie between 0 and 1, got {fraction}")
    if hasattr(dataset, "split"):  # several tasks: each by itself
        parts: tuple[Any, Any] = dataset.split(fraction, seed)
        return parts
    total = len(dataset)
    if total < 2:
        raise LLMBuilderError(f"cannot split {total} example(s) in two: give more data, or no validation_split")
    size = min(max(int(fraction * total + 0.5), 1), total - 1)
    held_out = set(random.Random(seed).sample(range(total), size))
    train = [index for index in range(total) if index not in held_out]
    return DatasetView(dataset, train), DatasetView(dataset, sorted(held_out))
