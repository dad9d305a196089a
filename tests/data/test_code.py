"""Lexical classes against tokenize and by hand; pieces of real files that rejoin, cut at nodes of the tree alone."""

import random
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tree_sitter
import tree_sitter_javascript
import tree_sitter_python

from llmbuilder.data import code
from llmbuilder.data.code import lexical_classes, split_at_nodes, token_classes, token_spans
from llmbuilder.errors import ConfigError
from llmbuilder.models import byte_tokenizer, train_tokenizer

SIGNS = {code.LAYOUT: "_", code.PUNCTUATION: ".", code.OPERATOR: "+", code.KEYWORD: "k", code.NAME: "n"}
SIGNS |= {code.LITERAL: "s", code.COMMENT: "c"}
PYTHON = "def f(a):\n    return a + 'ü' * 3  # sum\n"
JAVASCRIPT = "let é = f(1) + `x${a}`; // hi"


def signs(classes: Any) -> str:
    return "".join(SIGNS[kind] for kind in classes.tolist())


def test_code_language_names_the_reader() -> None:
    assert signs(lexical_classes(PYTHON, "python")) == "kkk_n.n.._____kkkkkk_n_+_sss_+_s__ccccc_"
    assert signs(lexical_classes(JAVASCRIPT, "javascript")) == "kkk_n_+_n.s._+_sssssss._ccccc"
    for wrong in ("klingon", "no such"):
        with pytest.raises(ConfigError, match=f"code_language='{wrong}': there is no module tree_sitter_{wrong}"):
            lexical_classes("a", wrong)


@pytest.mark.parametrize("cut", ["    return (a +", "def f(:\n  '''open", "  x = 1\n y = 2"])
def test_a_piece_of_a_file_is_read_past_its_errors(cut: str) -> None:
    classes = signs(lexical_classes(cut, "python"))
    assert len(classes) == len(cut) and set(classes) >= {"_", "n"}


def files(ending: str, count: int) -> list[str]:
    """Real files, the same ones on each run on a machine."""
    folders = [Path(sysconfig.get_paths()["purelib"]), Path(sysconfig.get_paths()["stdlib"])]
    paths = sorted(path for folder in folders for path in folder.rglob(f"*.{ending}"))
    random.Random(0).shuffle(paths)
    sources = []
    for path in paths:
        if len(sources) == count:
            break
        if 0 < path.stat().st_size < 16_000:
            try:
                sources.append(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                continue
    return sources


def spans_of_nodes(source: bytes, language: Any) -> tuple[dict[int, list[Any]], dict[int, list[Any]]]:
    """By start and by end, every node of the tree: (parent's id, index among its children, node)."""
    root = tree_sitter.Parser(tree_sitter.Language(language.language())).parse(source).root_node
    starts: dict[int, list[Any]] = {}
    ends: dict[int, list[Any]] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        for index, child in enumerate(node.children):
            starts.setdefault(child.start_byte, []).append((node.id, index))
            ends.setdefault(child.end_byte, []).append((node.id, index))
            stack.append(child)
    return starts, ends


@pytest.mark.parametrize(
    ("language", "module", "ending", "count"),
    [("python", tree_sitter_python, "py", 1000), ("javascript", tree_sitter_javascript, "js", 12)],
)
def test_real_files_rejoin_and_are_cut_at_one_node_or_a_run_of_siblings(
    language: str, module: Any, ending: str, count: int
) -> None:
    sources = files(ending, count)
    assert len(sources) == count if language == "python" else len(sources) >= 3
    cut, sizes = 0, []
    for number, source in enumerate(sources):
        pieces = split_at_nodes(source, language, random.Random(number))
        if pieces is None:
            continue
        cut += 1
        assert "".join(pieces) == source
        sizes.append(len(pieces.middle) / len(source))
        starts, ends = spans_of_nodes(source.encode(), module)
        start = len(pieces.prefix.encode())
        end = start + len(pieces.middle.encode())
        siblings = [(a, b) for a in starts[start] for b in ends[end] if a[0] == b[0] and a[1] <= b[1]]
        assert siblings, (number, pieces.middle[:60])
    assert cut >= 0.85 * len(sources)
    if language == "python":
        assert 0.05 < np.median(sizes) < 0.8 and min(sizes) < 0.01 < 0.7 < max(sizes)


def test_a_string_is_taken_whole() -> None:
    source = "x = 'a long string with many words in it'\n"
    middles = {split_at_nodes(source, "python", random.Random(n)) for n in range(200)} - {None}
    assert middles
    inside = source[5:-2]
    assert not any(piece.middle in inside and piece.middle != "x" for piece in middles if piece)


def test_nothing_is_cut_where_there_is_nothing_to_leave() -> None:
    for source in ("", " \n", "x"):
        assert split_at_nodes(source, "python", random.Random(0)) is None


@pytest.mark.parametrize("cut", [0, 7])
def test_each_token_stands_where_its_text_is(tmp_path: Path, cut: int) -> None:
    """For a tokenizer of words, of bytes (which end inside characters), and tokens that it would cut otherwise."""
    (tmp_path / "a.txt").write_text(PYTHON * 20)
    for tokenizer in (train_tokenizer([tmp_path / "a.txt"], 300), byte_tokenizer()):
        ids = tokenizer(PYTHON, add_special_tokens=False)["input_ids"][cut:]
        text, spans = token_spans(tokenizer, ids)
        assert PYTHON.endswith(text) and spans[0][0] == 0 and spans[-1][1] == len(text)
        for token, (start, end) in zip(ids, spans, strict=True):
            said = tokenizer.decode([token])
            assert text[start:end] in (said, "ü", "") if "\ufffd" in said else text[start:end] == said
    pieces = [token for word in ("re", "turn") for token in tokenizer(word)["input_ids"]]
    assert token_spans(tokenizer, pieces)[0] == "return"


def test_a_token_is_of_the_class_that_says_most_and_special_ones_divide(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<code>"], special_tokens=True)
    text = "a + 'b'<code>c"
    ids = tokenizer(text)["input_ids"]
    assert signs(token_classes(tokenizer, ids, "python")) == "n_+_sssnn"
    (tmp_path / "a.txt").write_text("return value\n" * 50)
    words = train_tokenizer([tmp_path / "a.txt"], 290)
    ids = words("return value\n")["input_ids"]
    classes = signs(token_classes(words, ids, "python"))
    texts = [words.decode([token]) for token in ids]
    assert dict(zip(texts, classes, strict=True))["return"] == "k"
    assert dict(zip(texts, classes, strict=True))[" value"] == "n"
