"""Examples that come tokenised."""

import numpy as np
import pytest
import torch

from llmbuilder.data import TokenDataset
from llmbuilder.errors import LLMBuilderError


def bound(rows, tokenizer, config, **settings):
    dataset = TokenDataset(rows)
    dataset.bind(tokenizer, config(**settings))
    return dataset


def test_lists_arrays_and_tensors_of_ids(tokenizer, config):
    dataset = bound([{"input_ids": kind([5, 6, 7])} for kind in (list, np.array, torch.tensor)], tokenizer, config)
    assert [dataset[n] for n in range(3)] == [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 3


def test_padding_is_left_out(tokenizer, config):
    row = {"input_ids": [9, 5, 9, 9], "labels": [-100, 5, 9, -100], "attention_mask": [0, 1, 1, 0]}
    assert bound([row], tokenizer, config)[0] == {"input_ids": [5, 9], "labels": [5, 9]}


def test_truncation_and_lost_targets_are_counted(tokenizer, config):
    rows = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}, {"input_ids": [7]}]
    dataset = bound(rows, tokenizer, config, max_seq_length=2)
    assert len(dataset) == 1 and dataset[0]["input_ids"] == [1, 2]
    assert (dataset.report.truncated, dataset.report.tokens_lost) == (1, 2)
    assert dataset.report.without_targets == [
        "rows[1]: no target within 2 tokens",
        "rows[2]: no target within 2 tokens",
    ]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"ids": [1]}, "no input_ids"),
        ({"input_ids": [[1, 2]]}, "of one dimension"),
        ({"input_ids": [1, 2], "labels": [1]}, "equally long"),
        ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "labels are not shifted here"),
        ({"input_ids": ["a"]}, "input_ids are no integers"),
        ({"input_ids": [1.5, 2]}, "input_ids are no integers"),
        ({"input_ids": [1, 2], "labels": [1.0, 2.0]}, "labels are no integers"),
        ({"input_ids": None}, "input_ids are no integers"),
        ({"input_ids": [1, 2**40]}, "ids from 1 to 1099511627776"),
        ({"input_ids": [1, -5]}, "ids from -5 to 1"),
    ],
)
def test_malformed_rows_are_named(tokenizer, config, row, complaint):
    dataset = bound([{"input_ids": [1, 2]}, row], tokenizer, config)
    assert len(dataset) == 1
    assert dataset.report.malformed[0].startswith("rows[1]: ") and complaint in dataset.report.malformed[0]


def test_generation_pairs(tokenizer, config):
    rows = [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4]},
        {"input_ids": [1, 2, 3, 4]},
        {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, -100]},
    ]
    dataset = bound(rows, tokenizer, config)
    assert dataset.generation_pairs(9) == [([1, 2, 3], tokenizer.decode([4])), ([1, 2], tokenizer.decode([3, 4]))]


def test_no_rows():
    with pytest.raises(LLMBuilderError, match="it has no rows"):
        TokenDataset([])


def test_a_model_without_a_tokenizer_will_do(config):
    dataset = bound([{"input_ids": [1, 2, 3]}], None, config)
    assert dataset[0]["input_ids"] == [1, 2, 3] and dataset.generation_pairs(3) == []
