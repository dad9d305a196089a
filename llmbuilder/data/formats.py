"""Files to rows. A row is a text or a dict, and knows where it stood.

| ending | a row is |
|---|---|
| .txt, .md, source files | the whole file, utf-8, line ends as they are; a byte order mark is not text |
| .jsonl, .ndjson | a line holding a JSON object or string; blank lines are no rows |
| .json | an element of the one array that the file holds |
| .parquet | a record |
| a folder | the rows of its files and those of its subfolders, files sorted by path; hidden files are left out |
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow
import pyarrow.parquet

from ..errors import LLMBuilderError
from .report import DataReport

Value: TypeAlias = str | dict[str, Any]
SOURCE_ENDINGS = (
    ".py",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".cu",
    ".java",
    ".js",
    ".ts",
    ".go",
    ".rs",
    ".rb",
    ".sh",
    ".sql",
)
TEXT_ENDINGS = (".txt", ".text", ".md", ".rst", ".tex", ".html", ".css", *SOURCE_ENDINGS)
ROW_ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet")


@dataclass(frozen=True, slots=True)
class Row:
    """One row and its place, as in ``data.jsonl:17`` (line) or ``data.parquet[16]`` (index)."""

    where: str
    value: Value


@dataclass(frozen=True)
class Reading:
    """The usable rows of a source, and the report of how many were read and which were malformed."""

    rows: list[Row]
    report: DataReport


Data: TypeAlias = str | Path | Sequence[Any] | Reading
"""A path; rows in memory: anything with a length and integer indices that yields strings or mappings; or rows read."""


def read_rows(data: Data) -> Reading:
    """Read all rows of a path or of a sequence in memory; a reading is returned as it is.

    Args:
        data: a file, a folder, or a sequence of strings and mappings.

    Returns:
        The rows, and a report of how many were read and which were malformed.

    Raises:
        LLMBuilderError: no such file, an ending that is not read, a folder without data files, an empty file, a text
            file that is not utf-8 (file and byte offset are named), a json or parquet file that cannot be parsed.
    """
    if isinstance(data, Reading):
        return data
    if isinstance(data, str | Path):
        return _read_path(Path(data))
    if isinstance(data, Mapping):
        raise LLMBuilderError(f"rows in memory are a sequence; this is a mapping: pass one of its values, {list(data)}")
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise LLMBuilderError(
            f"expected a path, or rows with a length and indices (such as a list), got {type(data).__name__}"
        )
    if not len(data):
        raise LLMBuilderError("the dataset is empty: it has no rows")
    report = DataReport("rows in memory")
    return Reading(list(_sequence_rows(data, report)), report)


def _sequence_rows(data: Sequence[Any], report: DataReport) -> Iterator[Row]:
    for index in range(len(data)):
        yield from _checked(f"rows[{index}]", data[index], report)


def _read_path(path: Path) -> Reading:
    report = DataReport(str(path))
    if not path.exists():
        raise LLMBuilderError(f"{path}: no such file or folder")
    files = _folder_files(path, report) if path.is_dir() else [path]
    rows: list[Row] = []
    for file in files:
        _reader(file)  # an unknown ending is worth saying before "empty"
        if file.stat().st_size:
            rows.extend(_reader(file)(file, report))
        elif path.is_dir():
            _reject(str(file), "empty file", report)
        else:
            raise LLMBuilderError(f"{path}: the file is empty")
    return Reading(rows, report)


def _folder_files(folder: Path, report: DataReport) -> list[Path]:
    files = []
    for file in sorted(folder.rglob("*"), key=lambda file: file.relative_to(folder).parts):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if hidden or not file.is_file():
            continue
        if file.suffix.lower() in TEXT_ENDINGS + ROW_ENDINGS:
            files.append(file)
        else:
            report.skipped_files.append(str(file))
    if not files:
        raise LLMBuilderError(f"{folder}: no data file in this folder; files ending in {_endings()} are read")
    return files


def _reader(file: Path) -> Callable[[Path, DataReport], Iterator[Row]]:
    ending = file.suffix.lower()
    if ending in TEXT_ENDINGS:
        return _text_rows
    if ending in (".jsonl", ".ndjson"):
        return _jsonl_rows
    if ending == ".json":
        return _json_rows
    if ending == ".parquet":
        return _parquet_rows
    what = f"files ending in '{ending}'" if ending else "files without an ending"
    raise LLMBuilderError(f"{file}: cannot read {what}; expected one of {_endings()}")


def _endings() -> str:
    return ", ".join(ROW_ENDINGS + TEXT_ENDINGS)


def _text_rows(file: Path, report: DataReport) -> Iterator[Row]:
    yield from _checked(str(file), _decode(file), report)


def _decode(file: Path) -> str:
    """The file's text; newlines are not translated, so that every token of the file is there."""
    try:
        return file.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise LLMBuilderError(
            f"{file}: not utf-8 at byte {error.start} ({error.object[error.start]:#04x}); convert the file to utf-8"
        ) from error


def _jsonl_rows(file: Path, report: DataReport) -> Iterator[Row]:
    # split at \n alone: other line ends may stand within a row, in its strings (U+2028) or between its tokens (\r)
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            _reject(where, f"not utf-8 at byte {error.start} of the line", report)
        except (ValueError, RecursionError) as error:
            _reject(where, f"not JSON: {error}", report)
        else:
            yield from _checked(where, value, report)


def _json_rows(file: Path, report: DataReport) -> Iterator[Row]:
    try:
        values = json.loads(_decode(file))
    except (ValueError, RecursionError) as error:
        raise LLMBuilderError(f"{file}: not JSON: {error}; name the file .jsonl if each line is a row") from error
    if not isinstance(values, list):
        raise LLMBuilderError(f"{file}: expected an array of rows, found {_kind(values)}")
    for index, value in enumerate(values):
        yield from _checked(f"{file}[{index}]", value, report)


def _parquet_rows(file: Path, report: DataReport) -> Iterator[Row]:
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            batches = [batch.to_pylist() for batch in table.iter_batches()]
    except (pyarrow.ArrowException, OSError) as error:
        raise LLMBuilderError(f"{file}: cannot be read as parquet: {error}") from error
    index = 0
    for batch in batches:
        for value in batch:
            yield from _checked(f"{file}[{index}]", value, report)
            index += 1


def _checked(where: str, value: Any, report: DataReport) -> Iterator[Row]:
    if isinstance(value, str | Mapping):
        report.rows += 1
        yield Row(where, value if isinstance(value, str) else dict(value))
    else:
        _reject(where, f"expected an object or a text, found {_kind(value)}", report)


def _reject(where: str, why: str, report: DataReport) -> None:
    report.rows += 1
    report.malformed.append(f"{where}: {why}")


def _kind(value: Any) -> str:
    return {list: "an array", dict: "an object", str: "a text", type(None): "null"}.get(
        type(value), type(value).__name__
    )
