"""Binding: tokenised once, and again when something that matters has changed."""

import copy

import pytest
from transformers import PreTrainedTokenizerFast

from llmbuilder.data import TaskDataset
from llmbuilder.errors import LLMBuilderError

QA = {"question": "q", "answer": "a"}


@pytest.fixture
def counted(monkeypatch):
    """How many times any tokenizer was called."""
    calls = []
    original = PreTrainedTokenizerFast.__call__

    def call(self, *args, **kwargs):
        calls.append(args)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", call)
    return calls


def test_bind_is_idempotent(tokenizer, config, counted):
    dataset = TaskDataset([QA] * 3, "question_answering")
    dataset.bind(tokenizer, config())
    report, example = dataset.report, dataset[0]
    assert len(counted) == 1
    dataset.bind(tokenizer, config())
    assert len(counted) == 1
    assert dataset.report is report and dataset[0] == example


def test_a_change_of_settings_tokenizer_or_template_binds_anew(tokenizer, chat_tokenizer, config, counted):
    dataset = TaskDataset([QA] * 3, "question_answering")
    dataset.bind(tokenizer, config())
    plain = dataset[0]
    dataset.bind(tokenizer, config(max_seq_length=21))
    assert len(dataset[0]["input_ids"]) == 21
    assert dataset.report.rows == 3 and dataset.report.kept == 3, "counted afresh, not added up"
    dataset.bind(tokenizer, config())
    assert dataset[0] == plain and len(counted) == 3
    tokenizer.chat_template = chat_tokenizer.chat_template
    dataset.bind(tokenizer, config())
    chat = dataset[0]
    assert chat != plain and len(counted) == 4
    dataset.bind(chat_tokenizer, config())
    assert dataset[0] == chat and len(counted) == 5


def test_the_dataset_own_tokenizer_serves_before_and_after_bind(tokenizer, config):
    dataset = TaskDataset([QA], "question_answering", tokenizer)
    before = dataset[0]
    dataset.bind(copy.deepcopy(tokenizer), config())
    assert dataset[0] == before
    dataset.bind(None, config())
    assert dataset[0] == before


def test_a_tokenizer_of_another_vocabulary_is_refused(tokenizer, bpe_tokenizer, config):
    with pytest.raises(LLMBuilderError, match="whose vocabulary is not the model's"):
        TaskDataset([QA], "question_answering", tokenizer).bind(bpe_tokenizer, config())


def test_no_tokenizer_or_a_slow_one(config):
    dataset = TaskDataset([QA], "question_answering")
    with pytest.raises(LLMBuilderError, match="the model has no tokenizer"):
        dataset.bind(None, config())
    with pytest.raises(LLMBuilderError, match="object is not a fast tokenizer"):
        dataset.bind(object(), config())
    with pytest.raises(LLMBuilderError, match="not tokenised yet"):
        dataset[0]


def test_indices_are_those_of_a_list(tokenizer):
    dataset = TaskDataset([{"question": "q", "answer": letter} for letter in "abc"], "question_answering", tokenizer)
    assert dataset[-1] == dataset[2] != dataset[0]
    assert len(list(dataset)) == 3
    for index in (3, -4):
        with pytest.raises(IndexError, match="of 3"):
            dataset[index]
