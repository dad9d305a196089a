"""Plain text, cut into blocks: every token is used once per epoch."""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import Any

import numpy as np

from ..errors import ConfigError
from .encode import RequestBuilder
from .examples import Binding, Example, Examples, GenerationPair, Ids, Settings, Tokenised, Tokenizer, collect_pairs
from .formats import Data, Row, read_rows
from .report import DataReport
from .shapes import RowError, main_shape, text_of
from .templates import TASKS

_PIECE_CHARS = 2**16  # a longer text is tokenised in pieces of about this size
_BATCH_CHARS = 2**22  # text collected before it is tokenised
_BATCH_PIECES = 64  # pieces and short documents handed to the tokenizer at once
_AROUND = 512  # characters on each side of a cut that are tokenised to try it
_TRIES = 8  # places that are tried for a cut
_WORD_END = re.compile(r"(?<=\w)(?=\s)")


class TextDataset:
    """Blocks of plain text for next-token training.

    The documents (files of a folder in the order of their paths, rows of jsonl or parquet in theirs) are tokenised one
    by one and cut into blocks of ``block_size``. No tokens are added, neither around nor between documents, and a block
    never holds two of them, so a document's last block may be shorter. Joined, its blocks are its tokens: none is lost
    or repeated. Every token of a block is a label; the loss shifts them by one inside the block.

    Bound with a configuration whose ``task_type`` or ``dialogue_format`` asks for responses, it reads the same rows as
    ``TaskDataset`` does (``Question: …`` and ``Answer: …`` lines, turns between separators, pairs, messages), and no
    example is longer than ``block_size``.

    Args:
        path: a text file (utf-8), a folder, a jsonl, json or parquet file with a column of text, or rows in memory.
        block_size: tokens in a block, at least 2. A smaller ``max_seq_length`` of the configuration takes its place,
            and the report says so.
        tokenizer: a fast tokenizer; None takes the model's when the tuner binds the dataset.
        column: the column of text; None takes ``text`` or ``content``.

    Raises:
        LLMBuilderError: what ``read_rows`` raises; when tokenised, no text at all.
        ConfigError: ``block_size`` below 2.
    """

    def __init__(
        self, path: Data, block_size: int = 1024, tokenizer: Tokenizer | None = None, *, column: str | None = None
    ) -> None:
        if block_size < 2:
            raise ConfigError(f"block_size must be at least 2 (a token and the one it predicts), got {block_size}")
        reading = read_rows(path)
        self._rows = reading.rows
        self._block_size = block_size
        self._column = column
        self._binding = Binding(self._build, reading.report, tokenizer, Settings(max_seq_length=block_size))

    def bind(self, tokenizer: Tokenizer, config: Any) -> None:
        """Tokenise with this tokenizer (idempotent); ``config.max_seq_length`` limits the block size."""
        self._binding.bind(tokenizer, config)

    @property
    def task_type(self) -> str:
        """``language_modeling``, unless the configuration that the dataset is bound with has another."""
        return self._binding.settings.task_type or "language_modeling"

    @property
    def metric(self) -> str:
        """``next_token``; ``exact_match`` for ``question_answering``."""
        return TASKS[self.task_type].metric if self.task_type in TASKS else "next_token"

    @property
    def report(self) -> DataReport:
        """Rows read and, once bound, what became of them."""
        return self._binding.report

    def __len__(self) -> int:
        return len(self._binding.examples())

    def __getitem__(self, index: int) -> Example:
        return self._binding.examples()[index]

    def generation_pair(self, index: int) -> GenerationPair | None:
        """The first half of a block as prompt ids, the rest as reference text; None for a block of one token."""
        return self._binding.generation_pair(index)

    def generation_pairs(self, limit: int) -> list[GenerationPair]:
        """The pairs of the first ``limit`` blocks."""
        return collect_pairs(self, limit)

    def _build(self, tokenizer: Tokenizer, settings: Settings, report: DataReport) -> Examples:
        if asks_for_responses(settings.task_type, self._rows):
            return RequestBuilder(self._rows, self._column)(tokenizer, settings, report)
        size = settings.max_seq_length or self._block_size
        smaller = f" (max_seq_length; block_size is {self._block_size})" if size < self._block_size else ""
        report.notes.append(f"Plain text in blocks of {size} tokens{smaller}")
        return Examples(self._blocks(tokenizer, size, report))

    def _blocks(self, tokenizer: Tokenizer, size: int, report: DataReport) -> Iterator[Tokenised]:
        for where, ids in _tokenise(tokenizer, self._documents(report)):
            if not len(ids):
                report.malformed.append(f"{where}: the tokenizer makes no token of it")
                continue
            report.kept += 1
            report.single_tokens += len(ids) % size == 1
            for start in range(0, len(ids), size):
                block = ids[start : start + size]
                yield Tokenised(block, np.ones(len(block), np.bool_), prompt=len(block) // 2)

    def _documents(self, report: DataReport) -> Iterator[tuple[str, str]]:
        for row in self._rows:
            try:
                yield row.where, text_of(row, self._column)
            except RowError as error:
                report.malformed.append(f"{row.where}: {error}")


def asks_for_responses(task_type: str | None, rows: list[Row]) -> bool:
    """Whether the task is to answer requests, rather than to go on with plain text (which code may be as well)."""
    if task_type == "code":
        return main_shape(rows) != "text"
    return task_type not in (None, "language_modeling")


def _tokenise(tokenizer: Tokenizer, documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, Ids]]:
    """Each document's ids, the same as ``tokenizer(text, add_special_tokens=False)`` would give for the whole text."""
    batch: list[str] = []
    owners: list[str] = []
    chars = 0
    for where, text in documents:
        for piece in cut(tokenizer, text):
            batch.append(piece)
            owners.append(where)
            chars += len(piece)
        if chars >= _BATCH_CHARS:
            yield from _join(owners, _ids(tokenizer, batch))
            batch, owners, chars = [], [], 0
    yield from _join(owners, _ids(tokenizer, batch))


def _join(owners: list[str], pieces: list[Ids]) -> Iterator[tuple[str, Ids]]:
    for where, group in groupby(zip(owners, pieces, strict=True), key=lambda item: item[0]):
        yield where, np.concatenate([ids for _, ids in group])


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[Ids]:
    ids: list[Ids] = []
    for start in range(0, len(texts), _BATCH_PIECES):
        encoded = tokenizer(
            texts[start : start + _BATCH_PIECES], add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids += [np.array(piece, np.int32) for piece in encoded["input_ids"]]
    return ids


def cut(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    """A long text in pieces whose ids, joined, are the ids of the whole. They need less memory and keep threads busy.

    Cuts stand before white space behind a word, and only where the surroundings have the same ids in two pieces as in
    one. Where there is no such place (a tokenizer that begins each text with a space, say), the rest stays whole.
    """
    start = 0
    while len(text) - start > 2 * _PIECE_CHARS:
        place = _safe_cut(tokenizer, text, start + _PIECE_CHARS)
        if place is None:
            break
        yield text[start:place]
        start = place
    yield text[start:]


def _safe_cut(tokenizer: Tokenizer, text: str, position: int) -> int | None:
    for match in islice(_WORD_END.finditer(text, position), _TRIES):
        place = match.start()
        before, behind = text[place - _AROUND : place], text[place : place + _AROUND]
        left, right, whole = _ids(tokenizer, [before, behind, before + behind])
        if np.array_equal(np.concatenate([left, right]), whole):
            return place
    return None
