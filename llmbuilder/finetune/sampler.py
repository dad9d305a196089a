"""Which examples form which batch, and the way from there to tensors."""

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
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


def check_examples(
    dataset: Sequence[Example],
    context: int | None,
    vocabulary: int | None = None,
    max_length: int | None = None,
    what: str = "data set",
) -> str:
    """See that a data set is a sequence of examples, and that the model and the collator can take each.

    Args:
        dataset: bound, where it can be.
        context: most tokens that the model reads.
        vocabulary: number of the model's tokens.
        max_length: most tokens of an example, the setting ``max_seq_length``.
        what: to call it in errors.

    Returns:
        A hash of all token ids, labels and weights, by which a resumed run knows its data.

    Raises:
        LLMBuilderError: no data set, or one without examples or without targets; an example that is none, or is too
            long, or has a token or label that the model does not.
    """
    no_sequence = not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"))
    if no_sequence or isinstance(dataset, str | bytes | os.PathLike | Mapping):
        raise LLMBuilderError(
            f"the {what} is a {type(dataset).__name__}: give a data set, TextDataset(path) or "
            "load_dataset(path, config) of llmbuilder.data, or a sequence of examples"
        )
    if not len(dataset):
        raise LLMBuilderError(f"the {what} has no examples")
    digest, longest, where, targets = hashlib.sha256(), 0, 0, 0
    for index in range(len(dataset)):
        example = dataset[index]
        pair = _as_array(example, f"the {what}: example {index}")
        if pair.shape[1] > longest:
            longest, where = pair.shape[1], index
        _check_tokens(pair, vocabulary, f"the {what}: example {index}")
        digest.update(pair.tobytes())
        if "weights" in example:
            digest.update(np.asarray(example["weights"], np.float64).tobytes())
        targets += int((pair[1, 1:] != IGNORED).sum())
    if not targets:
        raise LLMBuilderError(
            f"the {what} has no targets: nothing in it is learnt, for all labels are {IGNORED}, but for those of first "
            "tokens, which nothing predicts. Give labels, or longer examples (max_seq_length may cut the answers off)"
        )
    if context is not None and longest > context:
        raise LLMBuilderError(
            f"the {what}: the longest example ({where}) has {longest} tokens, the model's context {context}: "
            f"set max_seq_length (or the data set's block_size) to {context} or less, or cut the examples"
        )
    if max_length is not None and longest > max_length:
        raise LLMBuilderError(
            f"the {what}: the longest example ({where}) has {longest} tokens, and max_seq_length is {max_length}: "
            f"set it to {longest} or more, or cut the examples"
        )
    return digest.hexdigest()


def _as_array(example: Any, where: str) -> NDArray[np.int64]:
    """Ids and labels, one row each. Raises LLMBuilderError for what is no example; ``where`` begins the error."""
    if not isinstance(example, Mapping):
        raise LLMBuilderError(
            f"{where} is a {type(example).__name__}, and should be {{'input_ids': […], 'labels': […]}}: of texts make "
            "a TextDataset"
        )
    missing = [name for name in ("input_ids", "labels") if name not in example]
    if missing:
        raise LLMBuilderError(f"{where} has no {missing[0]}: give both input_ids and labels, or a TokenDataset of it")
    names = ["input_ids", "labels", *(["weights"] if "weights" in example else [])]
    try:
        rows = [np.asarray(example[name]) for name in names]
    except (TypeError, ValueError) as error:
        raise LLMBuilderError(f"{where} holds no plain numbers ({error}): give lists of them") from None
    lengths = {name: row.shape[0] if row.ndim == 1 else -1 for name, row in zip(names, rows, strict=True)}
    if -1 in lengths.values() or len(set(lengths.values())) > 1:
        raise LLMBuilderError(f"{where}: {' and '.join(names)} should be lists of one length, got {lengths}")
    if not lengths["input_ids"]:
        raise LLMBuilderError(f"{where} has no tokens: leave it out")
    if any(row.dtype.kind not in "iu" for row in rows[:2]) or rows[-1].dtype.kind not in "iuf":
        raise LLMBuilderError(f"{where}: input_ids and labels should be integers, and weights numbers")
    return np.stack(rows[:2]).astype(np.int64)


def _check_tokens(pair: NDArray[np.int64], vocabulary: int | None, where: str) -> None:
    """See that every token is one of the model's, and every label one or -100."""
    ids, labels = pair
    end = np.iinfo(np.int64).max if vocabulary is None else vocabulary
    for kind, values in (("token", ids), ("label", labels[labels != IGNORED])):
        if not values.size or (values.min() >= 0 and values.max() < end):
            continue
        least, most = int(values.min()), int(values.max())
        if least < 0:
            allowed = (
                "tokens start at 0" if kind == "token" else f"labels are tokens, or {IGNORED} where none is learnt"
            )
            raise LLMBuilderError(f"{where} holds the {kind} {least}, and {allowed}: correct it")
        raise LLMBuilderError(
            f"{where} holds the {kind} {most}, the model's vocabulary ends at {end - 1}: "
            "tokenise the data with the model's own tokenizer"
        )


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
