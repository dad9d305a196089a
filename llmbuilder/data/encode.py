"""Rows of requests and conversations to tokenised examples: rendered, masked, cut, and every loss counted."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from .examples import Examples, Settings, Tokenised, Tokenizer
from .formats import Row
from .report import DataReport
from .shapes import Message, RowError, conversation_rows, messages_of, pair_of, question_answer_rows, shape_of, text_of
from .templates import TASKS, Rendered, Writer

_BATCH = 512  # examples handed to the tokenizer at once

Placed: TypeAlias = tuple[str, Rendered]


@dataclass(frozen=True)
class RequestBuilder:
    """Makes the examples of ``settings.task_type`` from rows, when tokenizer and settings are known.

    ``column`` is where a row of plain text has its text; None: ``text`` or ``content``.
    """

    rows: list[Row]
    column: str | None = None

    def __call__(self, tokenizer: Tokenizer, settings: Settings, report: DataReport) -> Examples:
        """Render, tokenise, mask and cut; the report tells what became of each row."""
        writer = Writer(tokenizer)
        report.notes.append(f"Task {settings.task_type}. {writer.describe()}")
        rendered = self._rendered(writer, settings, report)
        return Examples(_tokenise(tokenizer, rendered, writer.adds_special_tokens, settings, report))

    def _rendered(self, writer: Writer, settings: Settings, report: DataReport) -> Iterator[Placed]:
        for row in self._pieces(settings, report):
            try:
                rendered = _render(row, writer, settings, report)
            except RowError as error:
                report.malformed.append(f"{row.where}: {error}")
                continue
            if rendered.spans or settings.response_loss_only is False:
                yield row.where, rendered
            else:
                report.without_targets.append(f"{row.where}: no assistant turn")

    def _pieces(self, settings: Settings, report: DataReport) -> Iterator[Row]:
        """The rows, and for a row of plain text the questions or conversations in it."""
        for row in self.rows:
            if shape_of(row) != "text":
                yield row
                continue
            try:
                pieces = list(_split(Row(row.where, text_of(row, self.column)), settings))
            except RowError as error:
                report.malformed.append(f"{row.where}: {error}")
                continue
            if not pieces:
                report.malformed.append(f"{row.where}: nothing but white space and separators")
                continue
            report.rows += len(pieces) - 1  # the text itself was counted when it was read
            for piece in pieces:
                if isinstance(piece, Row):
                    yield piece
                else:
                    report.malformed.append(piece)


def _split(row: Row, settings: Settings) -> Iterable[Row | str]:
    if settings.task_type == "question_answering":
        return question_answer_rows(row)
    if settings.task_type != "conversation":
        raise RowError("plain text, where a request and a response are expected")
    if settings.turn_separator is None:
        raise RowError("plain text is split into turns by turn_separator, and none is set")
    return conversation_rows(row, settings.turn_separator)


def _render(row: Row, writer: Writer, settings: Settings, report: DataReport) -> Rendered:
    if shape_of(row) == "messages":
        return _render_conversation(messages_of(row), writer, settings.max_turns, report)
    assert settings.task_type is not None
    return writer.pair(pair_of(row), TASKS[settings.task_type])


def _render_conversation(
    messages: list[Message], writer: Writer, max_turns: int | None, report: DataReport
) -> Rendered:
    """The system message and the last ``max_turns`` turns."""
    system = [message for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]
    if max_turns is not None and len(turns) > max_turns:
        messages, dropped = system + turns[-max_turns:], len(turns) - max_turns
        turns = turns[-max_turns:]
    else:
        dropped = 0
    try:
        rendered = writer.conversation(messages)
    except RowError:
        # many templates refuse an answer as the first turn, and a cut can leave one there
        answers = next((n for n, turn in enumerate(turns) if turn["role"] != "assistant"), len(turns))
        if not 0 < answers < len(turns):
            raise
        rendered, dropped = writer.conversation(system + turns[answers:]), dropped + answers
    report.dropped_turns += dropped
    return rendered


def _tokenise(
    tokenizer: Tokenizer, placed: Iterable[Placed], special: bool, settings: Settings, report: DataReport
) -> Iterator[Tokenised]:
    batch: list[Placed] = []
    for item in placed:
        batch.append(item)
        if len(batch) == _BATCH:
            yield from _tokenise_batch(tokenizer, batch, special, settings, report)
            batch = []
    if batch:
        yield from _tokenise_batch(tokenizer, batch, special, settings, report)


def _tokenise_batch(
    tokenizer: Tokenizer, batch: list[Placed], special: bool, settings: Settings, report: DataReport
) -> Iterator[Tokenised]:
    encoded = tokenizer(
        [rendered.text for _, rendered in batch],
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    for (where, rendered), ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        tokenised = _mark(rendered, ids, offsets, settings.response_loss_only is not False)
        limit = settings.max_seq_length or len(ids)
        if not tokenised.marks[1:limit].any():
            report.without_targets.append(f"{where}: {_why(tokenised, limit)}")
            continue
        report.kept += 1
        if len(ids) > limit:
            report.truncated += 1
            report.tokens_lost += len(ids) - limit
        yield Tokenised(tokenised.ids[:limit], tokenised.marks[:limit], tokenised.prompt, tokenised.reference)


def _why(tokenised: Tokenised, limit: int) -> str:
    if tokenised.marks[1:].any():
        return f"the response begins at token {tokenised.prompt}, and max_seq_length is {limit}"
    return "no token to predict"


def _mark(rendered: Rendered, ids: list[int], offsets: list[tuple[int, int]], responses_only: bool) -> Tokenised:
    """A token is learnt when its first character lies in a learnt span: what begins in the prompt is the prompt's."""
    starts = np.array([start for start, _ in offsets], np.int64)
    marks = np.full(len(ids), not responses_only)
    for start, end in rendered.spans:
        marks |= (starts >= start) & (starts < end)
    prompt = int(np.argmax(starts >= rendered.response_start)) if rendered.response_start else 0
    return Tokenised(np.array(ids, np.int32), marks, prompt, rendered.reference)
