"""Which examples form which batch, and the way from there to tensors."""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import LLMBuilderError
from ..methods import Batch, Example, Key

IGNORED = -100
T = TypeVar("T")


def shuffled(size: int, batch_size: int, seed: int, epoch: int) -> list[list[Key]]:
    """The keys of an epoch's batches: every example once, in an order that seed and epoch fix."""
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return batched([("train", index) for index in order], batch_size)


def in_order(size: int, batch_size: int) -> list[list[Key]]:
    """The keys of batches that go through a data set from its start to its end."""
    return batched([("train", index) for index in range(size)], batch_size)


def batched(items: Sequence[T], size: int) -> list[list[T]]:
    """Cut into lists of ``size``, the last one maybe shorter."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def check_examples(dataset: Sequence[Example], context: int | None, vocabulary: int | None = None) -> str:
    """See that a data set has examples, that each fits into the model's context and every token into its vocabulary.

    Returns:
        A hash of all token ids and labels, by which a resumed run knows its data.

    Raises:
        LLMBuilderError: no examples, the longest is longer than ``context``, or a token is not below ``vocabulary``.
    """
    if not len(dataset):
        raise LLMBuilderError("the data set has no examples")
    digest, longest = hashlib.sha256(), 0
    for index in range(len(dataset)):
        example = dataset[index]
        longest = max(longest, len(example["input_ids"]))
        largest = max(example["input_ids"], default=0)
        if vocabulary is not None and largest >= vocabulary:
            raise LLMBuilderError(
                f"example {index} holds the token {largest}, the model's vocabulary ends at {vocabulary - 1}: "
                "tokenise the data with the model's own tokenizer"
            )
        digest.update(np.array([example["input_ids"], example["labels"]], dtype=np.int64).tobytes())
    if context is not None and longest > context:
        raise LLMBuilderError(
            f"the longest example has {longest} tokens, the model's context {context}: "
            f"set max_seq_length (or the data set's block_size) to {context} or less"
        )
    return digest.hexdigest()


class Examples(Dataset[Example]):
    """Several data sets as one, whose index is a key."""

    def __init__(self, sources: Mapping[str, Sequence[Example]]) -> None:
        self.sources = sources

    def __getitem__(self, key: Key) -> Example:
        source, index = key
        return self.sources[source][index]


def load_batches(
    sources: Mapping[str, Sequence[Example]],
    plan: Sequence[list[Key]],
    collate: Callable[[list[Example]], dict[str, Tensor]],
    *,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """The batches of ``plan``, made by ``workers`` processes ahead of need.

    A generator of its own seeds the workers: the run's random state does not depend on how often loading starts.
    """
    loader: DataLoader[Any] = DataLoader(
        Examples(sources),
        batch_sampler=plan,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),
    )
    for keys, tensors in zip(plan, loader, strict=True):
        yield Batch(tensors, keys, int((tensors["labels"][:, 1:] != IGNORED).sum()))
