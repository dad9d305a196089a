"""Examples that are tokenised already: any map-style dataset of dicts with ``input_ids``."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .examples import (
    IGNORED,
    Binding,
    Example,
    Examples,
    GenerationPair,
    Ids,
    Marks,
    Settings,
    Tokenised,
    Tokenizer,
    collect_pairs,
)
from .formats import Data, Value, read_rows
from .report import DataReport


class TokenDataset:
    """Rows with ``input_ids`` and, if they like, ``labels`` (default: every token) and ``attention_mask``.

    Positions whose ``attention_mask`` is 0 are padding, and left out. Each row is read once.

    Args:
        path: a file of such rows, or rows in memory: a torch map-style dataset, a ``datasets.Dataset``, a list.
            Values may be lists, arrays or tensors of one dimension.

    Raises:
        LLMBuilderError: no rows; when bound, no example left.
    """

    task_type = "language_modeling"
    metric = "next_token"

    def __init__(self, path: Data) -> None:
        reading = read_rows(path)
        self._rows = reading.rows
        self._binding = Binding(self._build, reading.report, None, Settings(), tokenised=True)

    def bind(self, tokenizer: Tokenizer, config: Any) -> None:
        """Read the rows; ``config.max_seq_length`` cuts them. The tokenizer decodes references, and may be None."""
        self._binding.bind(tokenizer, config)

    @property
    def report(self) -> DataReport:
        """Rows read and, once bound, what became of them."""
        return self._binding.report

    def __len__(self) -> int:
        return len(self._binding.examples())

    def __getitem__(self, index: int) -> Example:
        return self._binding.examples()[index]

    def generation_pair(self, index: int) -> GenerationPair | None:
        """What stands before the last run of targets as prompt ids, the rest as reference text; of a row that is all
        targets, its halves."""
        return self._binding.generation_pair(index)

    def generation_pairs(self, limit: int) -> list[GenerationPair]:
        """The first ``limit`` pairs."""
        return collect_pairs(self, limit)

    def _build(self, tokenizer: Tokenizer, settings: Settings, report: DataReport) -> Examples:
        report.notes.append("Tokenised before")
        return Examples(self._tokenised(settings.max_seq_length, report))

    def _tokenised(self, limit: int | None, report: DataReport) -> Iterator[Tokenised]:
        for row in self._rows:
            try:
                ids, marks = _arrays(row.value)
            except (TypeError, ValueError) as error:
                report.malformed.append(f"{row.where}: {error}")
                continue
            if not marks[1:limit].any():
                report.without_targets.append(f"{row.where}: no target within {limit or len(ids)} tokens")
                continue
            report.kept += 1
            if limit is not None and len(ids) > limit:
                report.truncated += 1
                report.tokens_lost += len(ids) - limit
            yield Tokenised(ids[:limit], marks[:limit], _prompt_length(marks[:limit]))


def _arrays(row: Value) -> tuple[Ids, Marks]:
    if isinstance(row, str) or "input_ids" not in row:
        raise ValueError("no input_ids")
    ids = _integers(row, "input_ids")
    labels = _integers(row, "labels") if "labels" in row else ids
    if ids.ndim != 1 or labels.shape != ids.shape:
        raise ValueError(
            f"input_ids and labels must be of one dimension and equally long, got {ids.shape}, {labels.shape}"
        )
    if len(ids) and not 0 <= ids.min() <= ids.max() < 2**31:
        raise ValueError(f"ids from {ids.min()} to {ids.max()}, where a vocabulary's lie in [0, 2^31)")
    marks = labels != IGNORED
    if (labels != ids)[marks].any():
        raise ValueError("a label is neither its token nor -100; labels are not shifted here")
    if "attention_mask" in row:
        real = np.asarray(row["attention_mask"]) != 0
        ids, marks = ids[real], marks[real]
    return ids.astype(np.int32), marks


def _integers(row: dict[str, Any], column: str) -> NDArray[Any]:
    values = np.asarray(row[column])
    if values.size and values.dtype.kind not in "iu":
        raise ValueError(f"{column} are no integers")
    return values


def _prompt_length(marks: Marks) -> int:
    if marks.all():
        return len(marks) // 2
    last = len(marks) - int(np.argmax(marks[::-1]))  # behind the last target
    before = np.flatnonzero(~marks[:last])
    return int(before[-1]) + 1 if len(before) else 0
