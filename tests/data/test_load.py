"""The one door: which dataset comes out of which data and settings."""

import json

import datasets
import pytest
import torch

from llmbuilder.data import ChatDataset, MultiTaskDataset, TaskDataset, TextDataset, TokenDataset, load_dataset
from llmbuilder.errors import LLMBuilderError
from llmbuilder.finetune import FineTuningConfig

QA = {"question": "q", "answer": "a"}
ALPACA = {"instruction": "i", "output": "o"}
SUMMARY = {"document": "d", "summary": "s"}
CHAT = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}


@pytest.mark.parametrize(
    ("row", "settings", "kind", "task_type", "why"),
    [
        ({"text": "t"}, {}, TextDataset, "language_modeling", r"by the shape of the rows \(text\)"),
        (QA, {}, TaskDataset, "question_answering", r"by the shape of the rows \(question_answering\)"),
        (ALPACA, {}, TaskDataset, "instruction", "by the shape"),
        (SUMMARY, {}, TaskDataset, "summarization", "by the shape"),
        (CHAT, {}, ChatDataset, "conversation", r"by the shape of the rows \(messages\)"),
        (ALPACA, {"dialogue_format": True}, ChatDataset, "conversation", "as dialogue_format says"),
        (ALPACA, {"task_type": "conversation"}, ChatDataset, "conversation", "as task_type says"),
        (ALPACA, {"task_type": "code"}, TaskDataset, "code", "as task_type says"),
        ({"text": "t"}, {"task_type": "code"}, TextDataset, "code", "as task_type says"),
        (QA | {"text": "t"}, {"task_type": "language_modeling"}, TextDataset, "language_modeling", "as task_type"),
        (CHAT, {"task_type": "instruction"}, TaskDataset, "instruction", "as task_type says"),
        ({"input_ids": [1, 2]}, {}, TokenDataset, "language_modeling", "Tokenised before"),
    ],
)
def test_the_choice(tmp_path, tokenizer, config, row, settings, kind, task_type, why):
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    for data in (tmp_path / "data.jsonl", str(tmp_path), [row], datasets.Dataset.from_list([row])):
        dataset = load_dataset(data, config(**settings))
        dataset.bind(tokenizer, config(**settings))
        assert type(dataset) is kind and dataset.task_type == task_type
        assert len(dataset) == 1 and len(dataset[0]["input_ids"]) >= 1
        with pytest.raises(AssertionError, match=why):
            raise AssertionError(str(dataset.report))


def test_a_dataset_is_returned_as_it_is(config):
    dataset = TextDataset(["x"])
    assert load_dataset(dataset, config()) is dataset


def test_blocks_are_as_long_as_max_seq_length(tokenizer, config):
    dataset = load_dataset(["x" * 100], config(max_seq_length=30))
    dataset.bind(tokenizer, config(max_seq_length=30))
    assert [len(dataset[n]["input_ids"]) for n in range(len(dataset))] == [30, 30, 30, 10]


def test_the_shape_of_most_rows_decides_and_the_others_are_named(tokenizer, config):
    dataset = load_dataset([QA, "stray", QA], config())
    dataset.bind(tokenizer, config())
    assert dataset.task_type == "question_answering" and len(dataset) == 2
    assert dataset.report.malformed == ["rows[1]:1: text before the first 'Question:': 'stray'"]


def test_a_torch_dataset_of_tokenised_examples(tokenizer, config):
    class Tokens(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return {"input_ids": torch.arange(index, index + 4), "labels": torch.tensor([-100, -100, index + 2, -100])}

    dataset = load_dataset(Tokens(), config())
    dataset.bind(tokenizer, config())
    assert dataset[2] == {"input_ids": [2, 3, 4, 5], "labels": [-100, -100, 4, -100]}
    assert dataset.generation_pairs(3)[2] == ([2, 3], tokenizer.decode([4, 5]))


def test_unknown_columns_are_named(config, tokenizer):
    dataset = load_dataset([{"label": 1, "body": "x"}], config())
    with pytest.raises(LLMBuilderError, match="it has 'label' and 'body'"):
        dataset.bind(tokenizer, config())


def test_a_yaml_file_lists_several_tasks(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "b.jsonl").write_text('{"question": "Why?", "answer": "So."}\n')
    listed = tmp_path / "tasks.yaml"
    listed.write_text("- {name: text, data: a.txt, share: 0.75}\n- {name: qa, data: b.jsonl, share: 0.25}\n")
    data = load_dataset(listed, FineTuningConfig())
    assert isinstance(data, MultiTaskDataset)
    assert {name: type(part).__name__ for name, part in data.tasks.items()} == {
        "text": "TextDataset",
        "qa": "TaskDataset",
    }
    assert {name: float(share) for name, share in data.shares.items()} == {"text": 0.75, "qa": 0.25}


@pytest.mark.parametrize("content", ["- {name: a}", "text", "- {name: a, data: a.txt, share: much}", "a: [1"])
def test_a_yaml_file_that_lists_no_tasks_is_named(content, tmp_path):
    listed = tmp_path / "tasks.yaml"
    listed.write_text(content)
    with pytest.raises(LLMBuilderError, match=r"tasks.yaml: should be a list of \{name"):
        load_dataset(listed, FineTuningConfig())
    with pytest.raises(LLMBuilderError, match=r"nothing.yaml: cannot be read"):
        load_dataset(tmp_path / "nothing.yaml", FineTuningConfig())
