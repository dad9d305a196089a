"""Source code as text with structure: the lexical class of each character, and spans that the syntax tree bounds.

Python is read by ``tokenize`` where it is whole; everything else, and a piece cut out of a file, by tree-sitter, which
reads past errors. A language is the end of the name of its package: ``javascript`` is ``tree_sitter_javascript``.
"""

import importlib
import io
import itertools
import keyword
import random
import tokenize
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, LLMBuilderError
from .examples import Tokenizer, special_ids

LAYOUT, PUNCTUATION, OPERATOR, KEYWORD, NAME, LITERAL, COMMENT = range(7)
"""Lexical classes. Punctuation brackets, separates and ends; layout is white space, line breaks and indents."""

Classes = NDArray[np.uint8]
_PUNCTUATION = frozenset("()[]{},:;.")
_LITERALS = ("string", "number", "integer", "float", "char", "literal", "regex", "true", "false", "null", "none")
_TRIES = 8


class Pieces(NamedTuple):
    """A text in three pieces, of which the middle one is a node of its syntax tree or a run of siblings."""

    prefix: str
    middle: str
    suffix: str


def lexical_classes(source: str, language: str) -> Classes:
    """The class of each character, uint8. Raises ConfigError for a language whose package is not installed."""
    found = np.full(len(source), LAYOUT, np.uint8)
    lexer = _python_tokens if language == "python" else _tree_tokens
    try:
        tokens = list(lexer(source, language))
    except (tokenize.TokenError, SyntaxError):  # no whole file: tree-sitter makes sense of pieces
        tokens = list(_tree_tokens(source, language))
    for start, end, kind in tokens:
        found[start:end] = kind
    return found


def split_at_nodes(source: str, language: str, draw: random.Random) -> Pieces | None:
    """Cut out a part of a text that its syntax tree bounds: ``prefix + middle + suffix == source``.

    A random stretch of characters is drawn, then the children of the lowest node around it that it touches (arXiv
    2506.00204), so that small and large parts are as frequent as in fill-in-the-middle on characters. A string is
    taken whole. Nodes that hold syntax errors are left alone.

    Args:
        source: a file, or a piece of one.
        language: the name of its package; see the head of this file.
        draw: where the randomness comes from.

    Returns:
        The pieces; None where eight draws found no node that leaves some text around it.
    """
    encoded = source.encode()
    root = _parser(language).parse(encoded).root_node
    for _ in range(_TRIES if encoded else 0):
        first, last = sorted((draw.randrange(len(encoded)), draw.randrange(len(encoded))))
        span = _node_span(root, first, last + 1)
        if span is None:
            continue
        prefix, middle, suffix = encoded[: span[0]], encoded[span[0] : span[1]], encoded[span[1] :]
        if middle.strip() and (prefix + suffix).strip():
            return Pieces(prefix.decode(), middle.decode(), suffix.decode())
    return None


def token_classes(tokenizer: Tokenizer, ids: list[int], language: str) -> Classes:
    """The class of each token of a text: of its characters' classes the one that says most; of a special token NAME.

    What stands between special tokens is read by itself.
    """
    special = special_ids(tokenizer)
    found = np.full(len(ids), NAME, np.uint8)
    start = 0
    for is_special, group in itertools.groupby(ids, lambda token: token in special):
        piece = list(group)
        if not is_special:
            text, spans = token_spans(tokenizer, piece)
            classes = lexical_classes(text, language)
            found[start : start + len(piece)] = [_weightiest(classes[begin:end]) for begin, end in spans]
        start += len(piece)
    return found


def token_spans(tokenizer: Tokenizer, ids: list[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of some tokens, and where in it each of them stands."""
    text = decode(tokenizer, ids)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if encoded["input_ids"] == ids:
        return text, [(start, end) for start, end in encoded["offset_mapping"]]
    # Another cut of the same text: what each further token adds. A token that ends inside a character adds nothing yet.
    ends = [len(decode(tokenizer, ids[: n + 1]).rstrip("\ufffd")) for n in range(len(ids))]
    ends = np.minimum(np.maximum.accumulate(np.array(ends, dtype=int)), len(text)).tolist()
    return text, list(itertools.pairwise([0, *ends]))


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of some tokens, to the last white space."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _weightiest(classes: Classes) -> int:
    """Names say more than layout: the order of the classes, with punctuation and layout last."""
    return int(classes.max(initial=LAYOUT))


def _python_tokens(source: str, language: str) -> Iterator[tuple[int, int, int]]:
    starts = [0, *itertools.accumulate(len(line) for line in source.split("\n"))]
    starts = [start + n for n, start in enumerate(starts)]  # the line breaks themselves
    for token in tokenize.generate_tokens(io.StringIO(source, newline="\n").readline):
        (row, column), (end_row, end_column) = token.start, token.end
        kind = _python_class(token)
        if kind != LAYOUT:
            yield starts[row - 1] + column, starts[end_row - 1] + end_column, kind


def _python_class(token: tokenize.TokenInfo) -> int:
    if token.type == tokenize.NAME:
        return KEYWORD if keyword.iskeyword(token.string) else NAME
    if token.type == tokenize.OP:
        return PUNCTUATION if token.string in _PUNCTUATION else OPERATOR
    if token.type in (tokenize.NUMBER, tokenize.STRING) or tokenize.tok_name[token.type].startswith("FSTRING"):
        return LITERAL
    return COMMENT if token.type == tokenize.COMMENT else LAYOUT


def _tree_tokens(source: str, language: str) -> Iterator[tuple[int, int, int]]:
    encoded = source.encode()
    position = _character_positions(encoded)
    stack = [_parser(language).parse(encoded).root_node]
    while stack:
        node = stack.pop()
        if "string" in node.type and node.start_byte < node.end_byte and node.is_named and node.parent is not None:
            yield position[node.start_byte], position[node.end_byte], LITERAL
            continue
        if node.children:
            stack += node.children
        else:
            yield position[node.start_byte], position[node.end_byte], _leaf_class(node, encoded)


def _leaf_class(node: Any, encoded: bytes) -> int:
    text = encoded[node.start_byte : node.end_byte].decode(errors="replace")
    if "comment" in node.type:
        return COMMENT
    if not text.strip():
        return LAYOUT
    if any(word in node.type for word in _LITERALS):
        return LITERAL
    if node.is_named:
        return NAME
    if text[0].isalpha():
        return KEYWORD
    return PUNCTUATION if text in _PUNCTUATION else OPERATOR


def _character_positions(encoded: bytes) -> list[int]:
    """Which character each byte of a UTF-8 text belongs to, and one entry for the end."""
    starts = (np.frombuffer(encoded, np.uint8) & 0xC0) != 0x80
    return (
        [0, *np.cumsum(starts).tolist()]
        if len(encoded) == 0
        else [*(np.cumsum(starts) - 1).tolist(), int(starts.sum())]
    )


def _node_span(root: Any, first: int, end: int) -> tuple[int, int] | None:
    """Bytes of the children of the lowest node around a stretch that it touches, of a string the whole."""
    node = root.named_descendant_for_byte_range(first, end)
    if node is None:
        return None
    outer: Any = node
    while outer is not None:
        if "string" in outer.type and outer.parent is not None:
            node = outer
        outer = outer.parent
    touched = [child for child in node.named_children if child.end_byte > first and child.start_byte < end]
    chosen = [node] if "string" in node.type or not touched else touched
    if any(part.has_error or part.is_missing for part in chosen):
        return None
    return chosen[0].start_byte, chosen[-1].end_byte


@cache
def _parser(language: str) -> Any:
    """A parser of a language. Raises ConfigError where its package is not installed, or the name is no language's."""
    try:
        import tree_sitter

        module = importlib.import_module(f"tree_sitter_{language}")
    except ImportError:
        raise ConfigError(
            f"code_language='{language}': there is no module tree_sitter_{language} here; install the package "
            f"tree-sitter-{language.replace('_', '-')}, or correct the name"
        ) from None
    make = getattr(module, "language", None) or getattr(module, f"language_{language}", None)
    if make is None:
        raise LLMBuilderError(f"tree_sitter_{language} has no language() of its own")
    return tree_sitter.Parser(tree_sitter.Language(make()))
