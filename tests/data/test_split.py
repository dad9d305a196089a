"""Parts of a dataset: exact, deterministic, and each example in one of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuilder.data import TaskDataset, TextDataset, split
from llmbuilder.data.report import DataReport
from llmbuilder.errors import ConfigError, LLMBuilderError


class Numbers:
    """Examples that are their own index."""

    task_type, metric, report = "t", "m", DataReport("numbers")

    def __init__(self, size):
        self.size = size

    def bind(self, tokenizer, config):
        pass

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"input_ids": [index], "labels": [index]}

    def generation_pair(self, index):
        return ([index], str(index)) if index % 2 else None


def indices(part):
    return [part[n]["input_ids"][0] for n in range(len(part))]


@given(total=st.integers(2, 300), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 2**40))
def test_sizes_are_exact_and_each_example_is_in_one_part(total, fraction, seed):
    train, held_out = split(Numbers(total), fraction, seed)
    assert len(held_out) == min(max(int(fraction * total + 0.5), 1), total - 1)
    assert sorted(indices(train) + indices(held_out)) == list(range(total))
    again = split(Numbers(total), fraction, seed)
    assert (indices(train), indices(held_out)) == tuple(map(indices, again))


def test_seeds_differ_and_order_is_kept():
    first, second = (indices(split(Numbers(100), 0.2, seed)[1]) for seed in (0, 1))
    assert first != second and first == sorted(first) and len(first) == 20


def test_parts_know_what_the_whole_knows():
    train, held_out = split(Numbers(10), 0.5, 3)
    assert train.report is held_out.report is Numbers.report
    assert (train.task_type, train.metric) == ("t", "m")
    odd = [index for index in indices(train) if index % 2]
    assert train.generation_pairs(99) == [([index], str(index)) for index in odd]
    assert train.generation_pairs(1) == [([odd[0]], str(odd[0]))]


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_fraction_outside_of_0_and_1_is_refused(fraction):
    with pytest.raises(ConfigError, match="validation_split must lie between 0 and 1"):
        split(Numbers(10), fraction, 0)


@pytest.mark.parametrize("size", [0, 1])
def test_one_example_cannot_be_split(size):
    with pytest.raises(LLMBuilderError, match=f"cannot split {size} example"):
        split(Numbers(size), 0.5, 0)


def test_a_part_is_bound_with_its_whole(tokenizer, config):
    rows = [{"question": f"q{n}", "answer": "a"} for n in range(6)]
    dataset = TaskDataset(rows, "question_answering", tokenizer)
    train, _ = split(dataset, 0.5, 0)
    before = [train[n] for n in range(3)]
    train.bind(tokenizer, config())
    assert [train[n] for n in range(3)] == before


def test_binding_that_would_change_the_split_is_refused(tokenizer, config):
    train, _ = split(TextDataset(["x" * 100], block_size=10, tokenizer=tokenizer), 0.5, 0)
    with pytest.raises(LLMBuilderError, match="had 10 examples when it was split and has 20"):
        train.bind(tokenizer, config(max_seq_length=5))
