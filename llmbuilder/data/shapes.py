"""What a row says: the shapes that public datasets use, brought down to three, text, pair and messages."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from .formats import Row

Message: TypeAlias = dict[str, str]

TEXT_COLUMNS = ("text", "content")
# (shape, request, context or "", response): the first line whose request and response a row has names its shape
PAIR_COLUMNS = (
    ("instruction", "instruction", "input", "output"),
    ("instruction", "instruction", "context", "response"),
    ("question_answering", "question", "context", "answer"),
    ("question_answering", "question", "context", "answers"),
    ("summarization", "document", "", "summary"),
    ("summarization", "article", "", "highlights"),
    ("summarization", "dialogue", "", "summary"),
    ("summarization", "text", "", "summary"),
    ("instruction", "prompt", "", "completion"),
    ("instruction", "prompt", "", "response"),
    ("instruction", "input", "", "output"),
)
MESSAGE_COLUMNS = ("messages", "conversations")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


class RowError(ValueError):
    """Why one row cannot be used; the report names it with its place."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A request, what it is about (often empty), and the response to learn. ``system`` stands above them."""

    request: str
    context: str
    response: str
    system: str = ""


def shape_of(row: Row) -> str:
    """``messages``, ``instruction``, ``question_answering``, ``summarization``, ``tokens``, ``text`` or ``unknown``."""
    if isinstance(row.value, str):
        return "text"
    if "input_ids" in row.value:
        return "tokens"
    if any(row.value.get(column) is not None for column in MESSAGE_COLUMNS):
        return "messages"
    for shape, request, _, response in PAIR_COLUMNS:
        if request in row.value and response in row.value:
            return shape
    return "text" if any(column in row.value for column in TEXT_COLUMNS) else "unknown"


def main_shape(rows: list[Row]) -> str:
    """The shape of most rows; ``unknown`` where there are none."""
    shapes = Counter(shape_of(row) for row in rows)
    return shapes.most_common(1)[0][0] if shapes else "unknown"


def text_of(row: Row, column: str | None = None) -> str:
    """The text of a row of plain text: the row itself, or its ``column`` (default: ``text`` or ``content``)."""
    if isinstance(row.value, str):
        text = _encodable(row.value)
    else:
        names = TEXT_COLUMNS if column is None else (column,)
        name = next((name for name in names if name in row.value), None)
        if name is None:
            shape = shape_of(row)
            hint = "" if shape in ("text", "unknown") else f": a row of {shape}, which load_dataset or task_type reads"
            raise RowError(f"no column {_either(names)}; it has {_either(row.value, 'and')}{hint}")
        text = _string(row.value, name)
    if not text:
        raise RowError("the text is empty")
    return text


def pair_of(row: Row) -> Pair:
    """Request and response of a row in one of the shapes of ``PAIR_COLUMNS``."""
    if isinstance(row.value, str):
        raise RowError("plain text, where a request and a response are expected")
    for _, request, context, response in PAIR_COLUMNS:
        if request in row.value and response in row.value:
            return Pair(
                _string(row.value, request),
                _string(row.value, context, optional=True),
                _answer(row.value, response),
                _string(row.value, "system", optional=True),
            )
    pairs = ", ".join(sorted({f"{request}/{response}" for _, request, _, response in PAIR_COLUMNS}))
    raise RowError(
        f"neither messages, conversations nor a pair of columns ({pairs}); it has {_either(row.value, 'and')}"
    )


def messages_of(row: Row) -> list[Message]:
    """The messages of an OpenAI (``messages``: role, content) or ShareGPT (``conversations``: from, value) row."""
    assert isinstance(row.value, dict)
    column = next(column for column in MESSAGE_COLUMNS if row.value.get(column) is not None)
    turns = row.value[column]
    if not isinstance(turns, list):
        raise RowError(f"column '{column}' is not an array of turns but {type(turns).__name__}")
    messages = [_message(number, turn) for number, turn in enumerate(turns, start=1)]
    system = _string(row.value, "system", optional=True)
    return [{"role": "system", "content": system}, *messages] if system else messages


def question_answer_rows(row: Row) -> Iterator[Row | str]:
    """Rows of question and answer in a text of ``Question: …`` and ``Answer: …`` lines; a complaint for what is not.

    Lines that begin with neither go on with what they follow.
    """
    assert isinstance(row.value, str)
    parts = _marked_parts(row.value.replace("\r\n", "\n").split("\n"))
    for index, (mark, line, body) in enumerate(parts):
        where = f"{row.where}:{line}"
        before = parts[index - 1][0] if index else ""
        behind = parts[index + 1][0] if index + 1 < len(parts) else ""
        if mark == "":
            if body:
                yield f"{where}: text before the first 'Question:': {body[:40]!r}"
        elif mark == "answer":
            if before != "question":
                yield f"{where}: an answer without a question"
        elif behind == "answer":
            yield Row(where, {"question": body, "answer": parts[index + 1][2]})
        else:
            yield f"{where}: a question without an answer"


_MARK = re.compile(r"\s*(question|answer)\s*:", re.IGNORECASE)


def _marked_parts(lines: list[str]) -> list[tuple[str, int, str]]:
    """(``question``, ``answer``, or nothing before the first of them; number of its first line; text) of each part."""
    parts: list[tuple[str, int, list[str]]] = [("", 1, [])]
    for number, line in enumerate(lines, start=1):
        if mark := _MARK.match(line):
            parts.append((mark[1].lower(), number, [line[mark.end() :]]))
        else:
            parts[-1][2].append(line)
    return [(mark, number, "\n".join(body).strip()) for mark, number, body in parts]


def conversation_rows(row: Row, separator: str) -> Iterator[Row | str]:
    """Conversations in a plain text, as rows of messages: turns are split at ``separator`` and alternate, user first.

    A blank line ends a conversation. Where every line of a paragraph holds turns on both sides of a separator, each
    line is a conversation. A separator may stand before the first turn and behind the last; an empty turn between
    others is a complaint, since one can't know who speaks next.
    """
    assert isinstance(row.value, str)
    number = 1
    for block in re.split(r"((?:\n[ \t]*)+\n)", row.value.replace("\r\n", "\n")):
        if block.strip():
            lines = block.split("\n")
            alone = len(lines) > 1 and all(len(_turns(line, separator)) > 1 for line in lines if line.strip())
            for offset, piece in enumerate(lines if alone else [block]):
                turns, where = _turns(piece, separator), f"{row.where}:{number + offset}"
                if not all(turns):
                    yield f"{where}: an empty turn between two separators"
                elif turns:
                    messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
                    yield Row(where, {"messages": messages})
        number += block.count("\n")


def _turns(text: str, separator: str) -> list[str]:
    turns = [turn.strip() for turn in text.split(separator)]
    said = [number for number, turn in enumerate(turns) if turn]
    return turns[said[0] : said[-1] + 1] if said else []


def _message(number: int, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"turn {number} is not an object")
    role = turn.get("role", turn.get("from"))
    name = str(role).lower()
    if name not in ROLES:
        raise RowError(f"turn {number} has the unknown role {role!r}; known are {_either(ROLES, 'and')}")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise RowError(f"turn {number} ({role}) has no text as its content")
    return {"role": ROLES[name], "content": _encodable(content)}


def _answer(value: dict[str, Any], column: str) -> str:
    """The response; of several accepted ones, as SQuAD has them (``{"text": […]}``), the first."""
    found = value[column]
    if isinstance(found, dict):
        found = found.get("text")
    if isinstance(found, list) and found:
        found = found[0]
    return _string({column: found}, column)


def _string(value: dict[str, Any], column: str, optional: bool = False) -> str:
    found = value.get(column)
    if optional and found is None:
        return ""
    if not isinstance(found, str):
        raise RowError(f"column '{column}' is not a text but {type(found).__name__}")
    return _encodable(found)


def _encodable(text: str) -> str:
    """The text itself. JSON's escapes can spell half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        raise RowError(f"{half} at character {error.start} is half a surrogate pair, no character") from None
    return text


def _either(names: Any, word: str = "or") -> str:
    quoted = [f"'{name}'" for name in names]
    return f" {word} ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted or ["nothing"])
