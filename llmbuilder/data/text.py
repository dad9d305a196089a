"""Plain text, cut into blocks: every token is used once per epoch."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ..errors import ConfigError
from .examples import Binding, Example, Examples, GenerationPair, Ids, Settings, Tokenised, Tokenizer, collect_pairs
from .formats import Data, Row, read_rows
from .report import DataReport
from .shapes import RowError, text_of

_BATCH_CHARS = 2**20  # text handed to the tokenizer at once: enough for its threads, little memory


class TextDataset:
    """Blocks of plain text for next-token training.

    The documents (files of a folder in the order of their paths, rows of jsonl or parquet in theirs) are tokenised one
    by one and cut into blocks of ``block_size``. No tokens are added, neither around nor between documents, and a block
    never holds two of them, so a document's last block may be shorter. Joined, its blocks are its tokens: none is lost
    or repeated. Every token of a block is a label; the loss shifts them by one inside the block.

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

    task_type = "language_modeling"
    metric = "next_token"

    def __init__(
        self, path: Data, block_size: int = 1024, tokenizer: Tokenizer | None = None, *, column: str | None = None
    ) -> None:
        if block_size < 2:
            raise ConfigError(f"block_size must be at least 2 (a token and the one it predicts), got {block_size}")
        reading = read_rows(path)
        self._rows = reading.rows
        self._block_size = block_size
        self._column = column
        self._binding = Binding(self._build, reading.report, tokenizer, Settings())

    def bind(self, tokenizer: Tokenizer, config: Any) -> None:
        """Tokenise with this tokenizer (idempotent); ``config.max_seq_length`` limits the block size."""
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
        """The first half of a block as prompt ids, the rest as reference text; None for a block of one token."""
        return self._binding.generation_pair(index)

    def generation_pairs(self, limit: int) -> list[GenerationPair]:
        """The pairs of the first ``limit`` blocks."""
        return collect_pairs(self, limit)

    def _build(self, tokenizer: Tokenizer, settings: Settings, report: DataReport) -> Examples:
        size = min(self._block_size, settings.max_seq_length or self._block_size)
        smaller = f" (max_seq_length; block_size is {self._block_size})" if size < self._block_size else ""
        report.notes.append(f"Plain text in blocks of {size} tokens{smaller}")
        return Examples(self._blocks(tokenizer, size, report))

    def _blocks(self, tokenizer: Tokenizer, size: int, report: DataReport) -> Iterator[Tokenised]:
        for row, ids in _tokenise(tokenizer, self._documents(report)):
            report.kept += 1
            if len(ids) == 1:
                report.notes.append(f"{row.where} is a single token, which predicts nothing")
            for start in range(0, len(ids), size):
                block = ids[start : start + size]
                yield Tokenised(block, np.ones(len(block), np.bool_), prompt=len(block) // 2)

    def _documents(self, report: DataReport) -> Iterator[tuple[Row, str]]:
        for row in self._rows:
            try:
                yield row, text_of(row, self._column)
            except RowError as error:
                report.malformed.append(f"{row.where}: {error}")


def _tokenise(tokenizer: Tokenizer, documents: Iterable[tuple[Row, str]]) -> Iterator[tuple[Row, Ids]]:
    batch: list[tuple[Row, str]] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document[1])
        if chars >= _BATCH_CHARS:
            yield from _tokenise_batch(tokenizer, batch)
            batch, chars = [], 0
    if batch:
        yield from _tokenise_batch(tokenizer, batch)


def _tokenise_batch(tokenizer: Tokenizer, batch: list[tuple[Row, str]]) -> Iterator[tuple[Row, Ids]]:
    encoded = tokenizer(
        [text for _, text in batch], add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    for (row, _), ids in zip(batch, encoded["input_ids"], strict=True):
        yield row, np.array(ids, np.int32)
