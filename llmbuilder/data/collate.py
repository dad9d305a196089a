"""Examples to batches of tensors: padded, or packed with attention kept apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, LLMBuilderError, nearest
from .examples import IGNORED

COLLATORS = ("default", "packing")


@dataclass(frozen=True)
class Collator:
    """``collate`` with its settings, for a DataLoader; picklable, so that workers can have it."""

    collator: str = "default"
    pad_id: int = 0
    max_length: int | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return collate(examples, self.collator, self.pad_id, self.max_length)


def collate(
    examples: Sequence[Mapping[str, Any]],
    collator: str = "default",
    pad_id: int = 0,
    max_length: int | None = None,
) -> dict[str, Tensor]:
    """A batch of examples.

    ``default``: a row for each example, padded on the right to the longest.

    ``packing``: the examples (documents) in their order, each into the first row that has room for it. A row holds
    ``max_length`` tokens at most, and the batch is as wide as its fullest row. A document attends to itself alone and
    its positions start at 0, so the loss is that of the padded batch; its first token is no target, as nothing predicts
    it.

    Args:
        examples: dicts of ``input_ids`` and ``labels``, equally long lists; ``weights``, as long, where any has them.
        collator: ``default`` or ``packing``.
        pad_id: fills ``input_ids``. Padding is masked by length, so this may be the end-of-text token.
        max_length: longest row; None: the longest example's length.

    Returns:
        int64 tensors ``input_ids`` [B, T] and ``labels`` [B, T] (-100 at padding); ``weights`` [B, T] float32 where an
        example has them (1 elsewhere). For ``default``, ``attention_mask``
        [B, T], int64 of 0 and 1. For ``packing``, ``attention_mask`` [B, 1, T, T], bool, True = may attend (padding
        attends to itself, so that no row of the mask is empty), and ``position_ids`` [B, T], int64.

    Raises:
        ConfigError: an unknown collator.
        LLMBuilderError: no examples, an empty example, or one longer than ``max_length``.
    """
    if collator not in COLLATORS:
        raise ConfigError(
            f"unknown data_collator '{collator}'{nearest(collator, COLLATORS)} Known: {', '.join(COLLATORS)}"
        )
    if not examples:
        raise LLMBuilderError("collate: the batch is empty")
    longest = max(len(example["input_ids"]) for example in examples)
    if max_length is not None and longest > max_length:
        raise LLMBuilderError(f"collate: an example of {longest} tokens, and max_length is {max_length}")
    if not all(len(example["input_ids"]) for example in examples):
        raise LLMBuilderError("collate: an example without tokens")
    if collator == "default":
        return _padded(examples, longest, pad_id)
    return _packed(examples, max_length or longest, pad_id)


def _padded(examples: Sequence[Mapping[str, Any]], width: int, pad_id: int) -> dict[str, Tensor]:
    shape = (len(examples), width)
    batch = {
        "input_ids": torch.full(shape, pad_id, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        **_unit_weights(examples, shape),
    }
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        batch["input_ids"][row, :length] = torch.as_tensor(example["input_ids"])
        batch["labels"][row, :length] = torch.as_tensor(example["labels"])
        batch["attention_mask"][row, :length] = 1
        if "weights" in example:
            batch["weights"][row, :length] = torch.as_tensor(example["weights"])
    return batch


def _packed(examples: Sequence[Mapping[str, Any]], room: int, pad_id: int) -> dict[str, Tensor]:
    places = first_fit([len(example["input_ids"]) for example in examples], room)
    rows = 1 + max(row for row, _ in places)
    width = max(start + len(example["input_ids"]) for (_, start), example in zip(places, examples, strict=True))
    batch = {
        "input_ids": torch.full((rows, width), pad_id, dtype=torch.int64),
        "labels": torch.full((rows, width), IGNORED, dtype=torch.int64),
        "attention_mask": torch.eye(width, dtype=torch.bool).repeat(rows, 1, 1, 1),
        "position_ids": torch.zeros((rows, width), dtype=torch.int64),
        **_unit_weights(examples, (rows, width)),
    }
    for (row, start), example in zip(places, examples, strict=True):
        length = len(example["input_ids"])
        span = slice(start, start + length)
        batch["input_ids"][row, span] = torch.as_tensor(example["input_ids"])
        batch["labels"][row, span] = torch.as_tensor(example["labels"])
        batch["labels"][row, start] = IGNORED
        batch["attention_mask"][row, 0, span, span] = torch.ones(length, length, dtype=torch.bool).tril()
        batch["position_ids"][row, span] = torch.arange(length)
        if "weights" in example:
            batch["weights"][row, span] = torch.as_tensor(example["weights"])
    return batch


def _unit_weights(examples: Sequence[Mapping[str, Any]], shape: tuple[int, int]) -> dict[str, Tensor]:
    """Weights of 1 to write those of the examples over, where any has them."""
    return {"weights": torch.ones(shape)} if any("weights" in example for example in examples) else {}


def first_fit(lengths: Sequence[int], room: int) -> list[tuple[int, int]]:
    """(row, start) of each length, placed in order into the first row that has room."""
    used: list[int] = []
    places = []
    for length in lengths:
        row = next((row for row, taken in enumerate(used) if taken + length <= room), len(used))
        if row == len(used):
            used.append(0)
        places.append((row, used[row]))
        used[row] += length
    return places
