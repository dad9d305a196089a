"""Plain text in blocks: token count in, token count out, by ids."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmbuilder.data import TaskDataset, TextDataset, text
from llmbuilder.errors import ConfigError, LLMBuilderError

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def examples_of(dataset):
    return [dataset[index] for index in range(len(dataset))]


def ids_of(dataset):
    return [token for example in examples_of(dataset) for token in example["input_ids"]]


def test_every_token_of_a_file_is_used_once(tmp_path, bpe_tokenizer):
    content = "The quick brown fox — naïve, 日本語 🦊 —\r\n\r\n  jumps\tover 12345 dogs.\n" * 30
    file = tmp_path / "a.txt"
    file.write_bytes(content.encode())
    dataset = TextDataset(file, block_size=64, tokenizer=bpe_tokenizer)
    expected = bpe_tokenizer(content, add_special_tokens=False)["input_ids"]
    assert ids_of(dataset) == expected
    assert bpe_tokenizer.decode(ids_of(dataset)) == content
    full, rest = divmod(len(expected), 64)
    assert [len(example["input_ids"]) for example in examples_of(dataset)] == [64] * full + [rest] * bool(rest)
    assert all(example["labels"] == example["input_ids"] for example in examples_of(dataset))
    assert (dataset.report.tokens, dataset.report.targets) == (len(expected), len(expected) - len(dataset))


@quick
@given(
    documents=st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=6),
    size=st.integers(2, 12),
)
def test_blocks_of_any_documents(tokenizer, documents, size):
    dataset = TextDataset(documents, block_size=size, tokenizer=tokenizer)
    blocks = [example["input_ids"] for example in examples_of(dataset)]
    expected = []
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False)["input_ids"]
        expected += [ids[start : start + size] for start in range(0, len(ids), size)]
    assert blocks == expected
    assert dataset.report.kept == len(documents)
    assert dataset.report.single_tokens == sum(len(block) == 1 for block in blocks)


def test_a_folder_keeps_its_documents_apart_and_in_order(tmp_path, tokenizer):
    (tmp_path / "2.txt").write_text("second")
    (tmp_path / "1.jsonl").write_text('{"text": "first"}\n{"text": ""}\n{"body": "x"}\n{"text": 3}\n')
    dataset = TextDataset(tmp_path, block_size=4, tokenizer=tokenizer)
    assert [tokenizer.decode(example["input_ids"]) for example in examples_of(dataset)] == ["firs", "t", "seco", "nd"]
    jsonl = tmp_path / "1.jsonl"
    assert dataset.report.malformed == [
        f"{jsonl}:2: the text is empty",
        f"{jsonl}:3: no column 'text' or 'content'; it has 'body'",
        f"{jsonl}:4: column 'text' is not a text but int",
    ]
    assert (dataset.report.rows, dataset.report.kept) == (5, 2)
    assert "1 block of a single token" in str(dataset.report)


def test_a_named_column(tokenizer):
    dataset = TextDataset([{"text": "no", "body": "yes"}], tokenizer=tokenizer, column="body")
    assert tokenizer.decode(ids_of(dataset)) == "yes"


def test_no_begin_of_text_token_is_added(tokenizer):
    from tokenizers.processors import TemplateProcessing

    begin = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    assert begin in tokenizer("abc")["input_ids"]
    assert begin not in ids_of(TextDataset(["abc"], tokenizer=tokenizer))


def test_max_seq_length_limits_the_block(tokenizer, config):
    dataset = TextDataset(["x" * 100], block_size=64)
    dataset.bind(tokenizer, config(max_seq_length=40))
    assert [len(example["input_ids"]) for example in examples_of(dataset)] == [40, 40, 20]
    assert "blocks of 40 tokens (max_seq_length; block_size is 64)" in str(dataset.report)
    assert dataset.report.tokens_lost == 0


def test_generation_pairs_are_the_halves_of_blocks(tokenizer):
    dataset = TextDataset(["abcdeé", "z"], block_size=5, tokenizer=tokenizer)
    encode = lambda t: tokenizer(t)["input_ids"]  # noqa: E731
    assert dataset.generation_pairs(9) == [(encode("ab"), "cde"), (encode("é")[:1], tokenizer.decode(encode("é")[1:]))]
    assert dataset.generation_pairs(1) == [(encode("ab"), "cde")]
    assert dataset.generation_pair(2) is None


@pytest.mark.parametrize(
    ("content", "settings"),
    [
        ("Question: q?\nAnswer: a\n", {"task_type": "question_answering"}),
        ("hi<turn>yo<turn>bye<turn>", {"dialogue_format": True, "turn_separator": "<turn>"}),
    ],
)
def test_a_task_of_the_configuration_is_heard(tmp_path, tokenizer, config, content, settings):
    (tmp_path / "a.txt").write_text(content)
    dataset = TextDataset(tmp_path / "a.txt", block_size=99)
    dataset.bind(tokenizer, config(**settings))
    task = settings.get("task_type", "conversation")
    same = TaskDataset(tmp_path / "a.txt", task)
    same.bind(tokenizer, config(**settings))
    assert [dataset[0]] == [same[0]] and -100 in dataset[0]["labels"]
    assert (dataset.task_type, dataset.metric) == (task, same.metric)
    assert dataset.generation_pairs(5) == same.generation_pairs(5)
    dataset.bind(tokenizer, config())
    assert dataset.task_type == "language_modeling" and tokenizer.decode(ids_of(dataset)) == content


def test_code_in_plain_text_is_text_and_in_pairs_is_answered(tokenizer, config):
    for rows, learnt in ((["x = 1\n"], "x = 1\n"), ([{"prompt": "one", "completion": "x = 1"}], "x = 1<|im_end|>")):
        dataset = TextDataset(rows)
        dataset.bind(tokenizer, config(task_type="code"))
        assert tokenizer.decode([label for label in dataset[0]["labels"] if label != -100]) == learnt
        assert (dataset.task_type, dataset.metric) == ("code", "next_token")


def test_errors():
    with pytest.raises(ConfigError, match="block_size must be at least 2"):
        TextDataset(["x"], block_size=1)
    with pytest.raises(LLMBuilderError, match="not tokenised yet"):
        len(TextDataset(["x"]))


def test_nothing_left_is_an_error_that_says_why(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"label": 1}) + "\nnonsense\n")
    with pytest.raises(LLMBuilderError, match=r"no usable example.*a\.jsonl:2: not JSON.*a\.jsonl:1: no column"):
        len(TextDataset(tmp_path / "a.jsonl", tokenizer=tokenizer))


# Long texts are tokenised in pieces


@quick
@given(
    words=st.lists(
        st.sampled_from(["the", "dog's", "\n", "\n\n", "  ", "1234567", "—", "naïve", "日本", "."]),
        min_size=1,
        max_size=120,
    )
)
def test_pieces_have_the_ids_of_the_whole(bpe_tokenizer, monkeypatch, words):
    monkeypatch.setattr(text, "_PIECE_CHARS", 16)
    monkeypatch.setattr(text, "_AROUND", 24)
    whole = " ".join(words)
    pieces = list(text.cut(bpe_tokenizer, whole))
    assert "".join(pieces) == whole
    joined = [token for piece in pieces for token in bpe_tokenizer(piece)["input_ids"]]
    assert joined == bpe_tokenizer(whole)["input_ids"]
    assert ids_of(TextDataset([whole], tokenizer=bpe_tokenizer)) == joined


def test_a_long_text_is_cut_and_keeps_its_ids(bpe_tokenizer):
    whole = "the quick brown fox\njumps over 1234567 lazy dogs.\n\n" * 8000
    assert len(list(text.cut(bpe_tokenizer, whole))) > 3
    dataset = TextDataset([whole], block_size=512, tokenizer=bpe_tokenizer)
    assert ids_of(dataset) == bpe_tokenizer(whole, verbose=False)["input_ids"]


def test_a_text_without_a_safe_place_stays_whole(bpe_tokenizer, monkeypatch):
    monkeypatch.setattr(text, "_PIECE_CHARS", 16)
    assert list(text.cut(bpe_tokenizer, "日本語" * 100)) == ["日本語" * 100]
    vocab = {"▁": 0, "▁a": 1, "a": 2, "<unk>": 3}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    prefixing = PreTrainedTokenizerFast(tokenizer_object=inner)
    whole = "a a " * 40
    assert "".join(text.cut(prefixing, whole)) == whole
    assert ids_of(TextDataset([whole], tokenizer=prefixing)) == prefixing(whole)["input_ids"]
