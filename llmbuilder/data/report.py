"""What became of the data: every row that was read is accounted for here."""

from dataclasses import dataclass, field

from ..errors import LLMBuilderError

_NAMED = 3  # how many places a sentence names before it says "and n more"


@dataclass
class DataReport:
    """Counts of one reading and tokenising. ``str(report)`` is the paragraph that the tuner prints.

    Reading fills ``source``, ``rows``, ``malformed`` and ``skipped_files``; binding to a tokenizer fills the rest.
    """

    source: str
    rows: int = 0
    """Rows read: lines of jsonl, records of parquet or json, files of plain text, pairs or conversations in them."""
    kept: int = 0
    """Rows that became at least one example."""
    malformed: list[str] = field(default_factory=list)
    """One line for each row that could not be used: where it is and why."""
    skipped_files: list[str] = field(default_factory=list)
    """Files of a folder whose ending is not one of a data file."""
    without_targets: list[str] = field(default_factory=list)
    """Rows left out because no token of them would be trained on: no assistant turn, or cut before its first token."""
    truncated: int = 0
    """Examples cut at ``max_seq_length``."""
    tokens_lost: int = 0
    """Tokens that those cuts removed."""
    dropped_turns: int = 0
    """Turns of conversations left out because of ``max_turns``, or before the first user turn."""
    single_tokens: int = 0
    """Blocks of plain text of one token (a document's last one can be such): they are kept, and predict nothing."""
    examples: int = 0
    tokens: int = 0
    targets: int = 0
    """Tokens that enter the loss (the first token of an example never does: nothing precedes it)."""
    notes: list[str] = field(default_factory=list)
    """Choices that were made: which dataset, which template, which block size."""

    def copy(self) -> "DataReport":
        """A report that can be added to without touching this one."""
        return DataReport(
            self.source,
            self.rows,
            malformed=list(self.malformed),
            skipped_files=list(self.skipped_files),
            notes=list(self.notes),
        )

    def require_examples(self) -> None:
        """Raise when nothing is left to train on, and say why."""
        if not self.examples:
            raise LLMBuilderError(f"no usable example in the data. {self}")

    def __str__(self) -> str:
        sentences = [f"{self.source}: {_count(self.rows, 'row')} read, {self.kept} kept"]
        if self.examples:
            tokens = f"{_count(self.tokens, 'token')}, {self.targets} of them targets"
            sentences.append(f"{_count(self.examples, 'example')} with {tokens}")
        sentences += self.notes
        if self.malformed:
            sentences.append(f"{len(self.malformed)} malformed: {_some(self.malformed)}")
        if self.without_targets:
            sentences.append(f"{len(self.without_targets)} without a target: {_some(self.without_targets)}")
        if self.truncated:
            sentences.append(
                f"{_count(self.truncated, 'example')} truncated, {_count(self.tokens_lost, 'token')} lost; "
                "a larger max_seq_length keeps them"
            )
        if self.dropped_turns:
            sentences.append(f"{_count(self.dropped_turns, 'turn')} dropped")
        if self.single_tokens:
            sentences.append(f"{_count(self.single_tokens, 'block')} of a single token, with nothing to predict")
        if self.skipped_files:
            sentences.append(f"{_count(len(self.skipped_files), 'other file')} skipped: {_some(self.skipped_files)}")
        return ". ".join(sentences) + "."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _some(places: list[str]) -> str:
    more = len(places) - _NAMED
    return "; ".join(places[:_NAMED]) + (f"; and {more} more" if more > 0 else "")
