"""Files to rows: what is read, what is named, what is refused."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from llmbuilder.data.formats import read_rows
from llmbuilder.errors import LLMBuilderError


def values(reading):
    return [row.value for row in reading.rows]


def test_a_text_file_is_one_row_with_its_line_ends(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("één\r\nzwei\n".encode())
    assert values(read_rows(file)) == ["één\r\nzwei\n"]
    assert values(read_rows(str(file))) == ["één\r\nzwei\n"]


def test_a_byte_order_mark_is_not_text(tmp_path):
    for name, content in (("a.txt", "x"), ("b.jsonl", '{"text": "x"}'), ("c.json", '["x"]')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert values(read_rows(tmp_path)) == ["x", {"text": "x"}, "x"]


def test_a_bad_byte_is_named_with_file_and_offset(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes(b"abc\xe9def")
    with pytest.raises(LLMBuilderError, match=r"latin\.txt: not utf-8 at byte 3 \(0xe9\)"):
        read_rows(file)


def test_malformed_lines_are_named_and_the_others_kept(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"text": "a"}\r\n\r\n{"text": \n[1]\n{"text": "\xff"}\n"b"\nnull\n{"text":\r"\xe2\x80\xa8"}')
    reading = read_rows(file)
    assert values(reading) == [{"text": "a"}, "b", {"text": "\u2028"}]
    assert [row.where for row in reading.rows] == [f"{file}:1", f"{file}:6", f"{file}:8"]
    assert reading.report.rows == 7
    for place, complaint in zip(
        reading.report.malformed,
        [
            f"{file}:3: not JSON: ",
            f"{file}:4: expected an object or a text, found an array",
            f"{file}:5: not utf-8 at byte 10 of the line",
            f"{file}:7: expected an object or a text, found null",
        ],
        strict=True,
    ):
        assert place.startswith(complaint)


def test_deeply_nested_json_is_a_malformed_line(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 100_000 + "\n" + '{"text": "ok"}')
    reading = read_rows(tmp_path / "a.jsonl")
    assert values(reading) == [{"text": "ok"}] and len(reading.report.malformed) == 1


def test_a_huge_line_is_one_row(tmp_path):
    text = "word " * 400_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    assert values(read_rows(tmp_path / "a.jsonl")) == [{"text": text}]


def test_a_json_array_gives_its_elements(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('[{"text": "a"}, 3, "b"]')
    reading = read_rows(file)
    assert values(reading) == [{"text": "a"}, "b"]
    assert reading.report.malformed == [f"{file}[1]: expected an object or a text, found int"]


@pytest.mark.parametrize(
    ("content", "complaint"), [('{"text": "a"}', "expected an array of rows, found an object"), ("[1,", "not JSON")]
)
def test_other_json_is_refused(tmp_path, content, complaint):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(LLMBuilderError, match=complaint):
        read_rows(tmp_path / "a.json")


def test_parquet_rows_keep_nested_values(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "é"}], "n": 1}, {"messages": [], "n": None}]
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    reading = read_rows(file)
    assert values(reading) == rows
    assert reading.rows[1].where == f"{file}[1]"


def test_broken_parquet_is_refused_by_name(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(LLMBuilderError, match=r"a\.parquet: cannot be read as parquet"):
        read_rows(tmp_path / "a.parquet")


def test_a_folder_gives_its_files_sorted_and_names_the_others(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, content in {
        "b/1.txt": "3",
        "a.md": "1",
        "b.txt": "4",
        "a.txt": "2",
        "picture.PNG": "no",
        ".git/x.txt": "no",
        ".hidden.txt": "no",
    }.items():
        (tmp_path / name).write_text(content)
    reading = read_rows(tmp_path)
    assert values(reading) == ["1", "2", "3", "4"]
    assert reading.report.skipped_files == [str(tmp_path / "picture.PNG")]


def test_an_empty_file_is_an_error_and_in_a_folder_a_complaint(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(LLMBuilderError, match=r"a\.txt: the file is empty"):
        read_rows(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("b")
    reading = read_rows(tmp_path)
    assert values(reading) == ["b"]
    assert reading.report.malformed == [f"{tmp_path / 'a.txt'}: empty file"]
    assert reading.report.rows == 2


def test_what_is_not_there_or_not_read_is_said(tmp_path):
    with pytest.raises(LLMBuilderError, match="no such file or folder"):
        read_rows(tmp_path / "nowhere.txt")
    with pytest.raises(LLMBuilderError, match="no data file in this folder"):
        read_rows(tmp_path)
    for name, what in (("table.csv", "files ending in '.csv'"), ("corpus", "files without an ending")):
        (tmp_path / name).write_text("")
        with pytest.raises(LLMBuilderError, match=f"cannot read {what}; expected one of .jsonl"):
            read_rows(tmp_path / name)


def test_rows_in_memory_are_any_sequence_of_texts_and_mappings():
    class Rows:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return ["a", {"text": "b"}, 7][index]

    reading = read_rows(Rows())
    assert values(reading) == ["a", {"text": "b"}]
    assert reading.report.malformed == ["rows[2]: expected an object or a text, found int"]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [([], "it has no rows"), ({"train": ["a"]}, r"one of its values, \['train'\]"), (iter(["a"]), "list_iterator")],
)
def test_what_are_no_rows_is_said(data, complaint):
    with pytest.raises(LLMBuilderError, match=complaint):
        read_rows(data)
