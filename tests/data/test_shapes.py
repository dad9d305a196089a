"""The shapes of rows, and what plain text is split into."""

import pytest

from llmbuilder.data.formats import Row
from llmbuilder.data.shapes import (
    Pair,
    RowError,
    conversation_rows,
    messages_of,
    pair_of,
    question_answer_rows,
    shape_of,
    text_of,
)


@pytest.mark.parametrize(
    ("value", "shape", "pair"),
    [
        ({"instruction": "i", "input": "c", "output": "o"}, "instruction", Pair("i", "c", "o")),
        ({"instruction": "i", "input": None, "output": "o"}, "instruction", Pair("i", "", "o")),
        ({"instruction": "i", "output": "o", "system": "s"}, "instruction", Pair("i", "", "o", "s")),
        ({"instruction": "i", "context": "c", "response": "o"}, "instruction", Pair("i", "c", "o")),
        ({"prompt": "p", "completion": "c"}, "instruction", Pair("p", "", "c")),
        ({"question": "q", "answer": "a", "text": "t"}, "question_answering", Pair("q", "", "a")),
        ({"question": "q", "context": "c", "answers": {"text": ["a", "b"]}}, "question_answering", Pair("q", "c", "a")),
        ({"document": "d", "summary": "s"}, "summarization", Pair("d", "", "s")),
        ({"text": "d", "summary": "s"}, "summarization", Pair("d", "", "s")),
    ],
)
def test_pairs(value, shape, pair):
    row = Row("here", value)
    assert shape_of(row) == shape
    assert pair_of(row) == pair


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        ("plain", "text"),
        ({"content": "x"}, "text"),
        ({"messages": []}, "messages"),
        ({"conversations": [], "messages": None}, "messages"),
        ({"input_ids": [1]}, "tokens"),
        ({"label": 3}, "unknown"),
    ],
)
def test_other_shapes(value, shape):
    assert shape_of(Row("here", value)) == shape


def test_text_columns():
    assert text_of(Row("here", "plain")) == "plain"
    assert text_of(Row("here", {"content": "c"})) == "c"
    assert text_of(Row("here", {"text": "t", "body": "b"}), "body") == "b"
    with pytest.raises(RowError, match="no column 'text' or 'content'; it has 'label'"):
        text_of(Row("here", {"label": 1}))
    with pytest.raises(RowError, match="a row of summarization, which load_dataset or task_type reads"):
        text_of(Row("here", {"document": "d", "summary": "s"}))
    with pytest.raises(RowError, match="column 'text' is not a text but int"):
        text_of(Row("here", {"text": 1}))
    with pytest.raises(RowError, match="the text is empty"):
        text_of(Row("here", {"text": ""}))


@pytest.mark.parametrize("value", ["a \ud83d", {"text": "a \ud83d"}])
def test_half_a_character_is_no_text(value):
    with pytest.raises(RowError, match=r"\\ud83d at character 2 is half a surrogate pair"):
        text_of(Row("here", value))
    assert text_of(Row("here", "\U0001f600")) == "\U0001f600"


def test_openai_and_sharegpt_messages():
    expected = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    parts = [{"type": "text", "text": "u"}]
    openai = {"messages": [expected[0], {"role": "user", "content": parts}, expected[2] | {"name": "x"}]}
    sharegpt = {
        "system": "s",
        "conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}],
    }
    assert messages_of(Row("here", openai)) == expected
    assert messages_of(Row("here", sharegpt)) == expected


@pytest.mark.parametrize(
    ("turns", "complaint"),
    [
        ("hi", "column 'messages' is not an array of turns but str"),
        (["hi"], "turn 1 is not an object"),
        ([{"role": "user", "content": "x"}, {"role": "bot9", "content": "x"}], "turn 2 has the unknown role 'bot9'"),
        ([{"role": ["user"], "content": "x"}], "turn 1 has the unknown role"),
        ([{"role": "user", "content": "a \ud83d"}], r"\\ud83d at character 2 is half a surrogate pair"),
        ([{"role": "assistant", "content": None}], r"turn 1 \(assistant\) has no text"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"turn 1 \(user\) has no text"),
    ],
)
def test_malformed_messages_are_described(turns, complaint):
    with pytest.raises(RowError, match=complaint):
        messages_of(Row("here", {"messages": turns}))


def test_questions_and_answers_in_text():
    text = (
        "Heading\r\n\r\nQuestion: one?\r\nAnswer: first\r\n  line two\r\n\r\nquestion : two?\r\nA: more of two\r\n"
        "ANSWER:\r\nsecond\r\nAnswer: stray\r\nQuestion: three?\r\nQuestion: four?"
    )
    pieces = list(question_answer_rows(Row("f", text)))
    assert [piece for piece in pieces if isinstance(piece, Row)] == [
        Row("f:3", {"question": "one?", "answer": "first\n  line two"}),
        Row("f:7", {"question": "two?\nA: more of two", "answer": "second"}),
    ]
    assert [piece for piece in pieces if isinstance(piece, str)] == [
        "f:1: text before the first 'Question:': 'Heading'",
        "f:11: an answer without a question",
        "f:12: a question without an answer",
        "f:13: a question without an answer",
    ]


def test_words_that_begin_like_a_mark_are_text():
    text = "Question: is Q1 good?\nAnswers: vary\nAnswer: yes"
    (row,) = question_answer_rows(Row("f", text))
    assert row.value == {"question": "is Q1 good?\nAnswers: vary", "answer": "yes"}


@pytest.mark.parametrize(
    ("text", "conversations"),
    [
        ("hi<turn>yo<turn>bye", [("f:1", ["hi", "yo", "bye"])]),
        ("hi\n<turn>\nyo\nyo\n<turn>\nbye\n", [("f:1", ["hi", "yo\nyo", "bye"])]),
        ("a<turn>b\r\n\r\nc<turn>d\n \n\n", [("f:1", ["a", "b"]), ("f:3", ["c", "d"])]),
        ("a<turn>b\nc<turn>d<turn>e\n", [("f:1", ["a", "b"]), ("f:2", ["c", "d", "e"])]),
        ("lonely", [("f:1", ["lonely"])]),
        ("<turn>a<turn>b<turn>", [("f:1", ["a", "b"])]),
        ("<turn>\n\n<turn>", []),
    ],
)
def test_conversations_in_text(text, conversations):
    rows = list(conversation_rows(Row("f", text), "<turn>"))
    assert [(row.where, [m["content"] for m in row.value["messages"]]) for row in rows] == conversations
    for row in rows:
        roles = [message["role"] for message in row.value["messages"]]
        assert roles == [("user", "assistant")[n % 2] for n in range(len(roles))]


def test_an_empty_turn_is_a_complaint_as_the_next_speaker_is_unknown():
    pieces = list(conversation_rows(Row("f", "a<turn><turn>b\n\nc<turn>d"), "<turn>"))
    assert pieces[0] == "f:1: an empty turn between two separators"
    assert [message["content"] for message in pieces[1].value["messages"]] == ["c", "d"]


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({"question": ["q"], "answer": "a"}, "column 'question' is not a text but list"),
        ({"question": "q", "answers": {"text": []}}, "column 'answers' is not a text but list"),
        ({"prompt": "p", "completion": None}, "column 'completion' is not a text but NoneType"),
        ({"prompt": "p", "completion": "\udc00"}, r"\\udc00 at character 0 is half a surrogate pair"),
        ({"label": 1}, "neither messages, conversations nor a pair of columns .*; it has 'label'"),
        ("text", "plain text, where a request and a response are expected"),
    ],
)
def test_malformed_pairs_are_described(value, complaint):
    with pytest.raises(RowError, match=complaint):
        pair_of(Row("here", value))
