"""Which examples, in which order, made by whom."""

import os
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from llmbuilder.data import Collator
from llmbuilder.errors import LLMBuilderError
from llmbuilder.finetune.sampler import check_examples, in_order, load_batches, shuffled

CHECKS: Any = Collator()


class FromProcess:
    """Examples that tell which process made them."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": [index, os.getpid()], "labels": [index, os.getpid()]}


def test_every_example_once_an_epoch_the_last_batch_short() -> None:
    plan = shuffled(10, 4, seed=1, epoch=0)
    assert [len(keys) for keys in plan] == [4, 4, 2]
    assert Counter(key for keys in plan for key in keys) == Counter(("train", index) for index in range(10))


def test_seed_and_epoch_fix_the_order() -> None:
    assert shuffled(50, 4, seed=1, epoch=2) == shuffled(50, 4, seed=1, epoch=2)
    others = [shuffled(50, 4, seed=1, epoch=3), shuffled(50, 4, seed=2, epoch=2), in_order(50, 4)]
    assert all(shuffled(50, 4, seed=1, epoch=2) != other for other in others)


def test_the_batch_size_does_not_change_the_order() -> None:
    flat = [[key for keys in shuffled(11, size, seed=4, epoch=1) for key in keys] for size in (1, 3, 11)]
    assert flat[0] == flat[1] == flat[2]


def test_batches_hold_what_the_plan_says_and_count_their_targets() -> None:
    sources = {
        "train": [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}],
        "other": [{"input_ids": [9, 8, 7], "labels": [-100, -100, 7]}],
    }
    plan = [[("train", 1), ("other", 0)], [("train", 0)]]
    first, second = load_batches(sources, plan, CHECKS)
    assert first.keys == plan[0]
    assert first.tensors["input_ids"].tolist() == [[4, 5, 0], [9, 8, 7]]
    assert (first.targets, second.targets) == (2, 2)


def test_no_batches_of_an_empty_plan() -> None:
    assert list(load_batches({"train": []}, [], CHECKS)) == []


def test_workers_make_the_batches_in_order() -> None:
    makers = [
        [
            (int(row[0]), int(row[1]))
            for batch in load_batches({"train": FromProcess()}, in_order(6, 1), CHECKS, workers=n)
            for row in batch.tensors["input_ids"]
        ]
        for n in (0, 2)
    ]
    assert [index for index, _ in makers[1]] == list(range(6))
    assert {process for _, process in makers[0]} == {os.getpid()}
    assert len({process for _, process in makers[1]} - {os.getpid()}) == 2


def test_loading_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    list(load_batches({"train": FromProcess()}, in_order(6, 2), CHECKS))
    assert torch.equal(torch.get_rng_state(), state)


def test_pin_memory_reaches_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    loader = torch.utils.data.DataLoader

    def spy(*args: Any, **settings: Any) -> Any:
        seen.append(settings.pop("pin_memory"))
        return loader(*args, **settings)

    monkeypatch.setattr("llmbuilder.finetune.sampler.DataLoader", spy)
    for pin in (False, True):
        list(load_batches({"train": FromProcess()}, in_order(6, 2), CHECKS, pin_memory=pin))
    assert seen == [False, True]


def test_the_hash_sees_every_token_label_and_weight() -> None:
    data = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [-100]}]
    other_label = [data[0], {"input_ids": [4], "labels": [4]}]
    other_cut = [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 4], "labels": [3, -100]}]
    weighed = [[{**data[0], "weights": [1.0, 1.0, weight]}, data[1]] for weight in (1.0, 0.5)]
    others = [other_label, other_cut, data[::-1], *weighed]
    hashes = [check_examples(examples, 8) for examples in (data, list(data), *others)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 1 + len(others)


def test_tokens_that_the_model_does_not_have_are_refused() -> None:
    data = [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 61], "labels": [1, 61]}]
    assert check_examples(data, 8, 62)
    with pytest.raises(LLMBuilderError, match="example 1 holds the token 61, the model's vocabulary ends at 60"):
        check_examples(data, 8, 61)


FINE = {"input_ids": [1, 2], "labels": [-100, 2]}
BAD: dict[str, tuple[Any, str]] = {
    "a path": ("data.txt", r"is a str: give a data set, TextDataset\(path\) or load_dataset\(path, config\)"),
    "nothing": (None, "is a NoneType: give a data set"),
    "texts": (["one", "two"], "example 0 is a str, and should be .*TextDataset"),
    "no labels": ([FINE, {"input_ids": [1]}], "example 1 has no labels: give both"),
    "lengths": ([FINE, {"input_ids": [1, 2], "labels": [1]}], "example 1: input_ids and labels .* of one length"),
    "weights": ([FINE, FINE | {"weights": [1.0]}], "example 1: .*weights should be lists of one length"),
    "empty": ([FINE, {"input_ids": [], "labels": []}], "example 1 has no tokens: leave it out"),
    "floats": ([FINE, {"input_ids": [1.5], "labels": [1]}], "example 1: input_ids and labels should be integers"),
    "negative": ([FINE, {"input_ids": [-2], "labels": [1]}], "example 1 holds the token -2, and tokens start at 0"),
    "label": (
        [FINE, {"input_ids": [1], "labels": [-1]}],
        "example 1 holds the label -1, and labels are tokens, or -100",
    ),
    "big label": ([FINE, {"input_ids": [1], "labels": [9999]}], "example 1 holds the label 9999, .* ends at 60"),
}


@pytest.mark.parametrize(("data", "told"), BAD.values(), ids=BAD.keys())
def test_what_is_no_sequence_of_examples_is_refused_by_number(data: Any, told: str) -> None:
    with pytest.raises(LLMBuilderError, match=told):
        check_examples(data, 8, 61)


def test_arrays_and_tensors_are_examples_too() -> None:
    rows: list[Any] = [torch.tensor([1, 2]), np.array([1, 2], dtype=np.int32), (1, 2)]
    assert len({check_examples([{"input_ids": row, "labels": row}], 8, 61) for row in rows}) == 1


def test_examples_longer_than_max_seq_length_are_refused_by_the_datas_name() -> None:
    data = [FINE, {"input_ids": [1] * 5, "labels": [1] * 5}]
    assert check_examples(data, 8, 61, 5)
    with pytest.raises(
        LLMBuilderError, match=r"general data: the longest example \(1\) .* max_seq_length is 4: set it to 5"
    ):
        check_examples(data, 8, 61, 4, "general data")


def test_no_examples_and_too_long_ones_are_refused() -> None:
    with pytest.raises(LLMBuilderError, match="no examples"):
        check_examples([], 8)
    data = [{"input_ids": list(range(9)), "labels": list(range(9))}]
    assert check_examples(data, 9)
    with pytest.raises(LLMBuilderError, match="9 tokens, the model's context 8: set max_seq_length"):
        check_examples(data, 8)


@pytest.mark.parametrize("labels", [[[-100, -100], [-100]], [[3, -100], [5]]])
def test_a_data_set_without_targets_is_refused(labels: list[list[int]]) -> None:
    """The label of a first token is none: nothing stands before it. Single examples may do without."""
    rows = [{"input_ids": [3, 4, 5][: len(row)], "labels": row} for row in labels]
    with pytest.raises(LLMBuilderError, match="the general data has no targets: nothing in it is learnt"):
        check_examples(rows, 8, 61, what="general data")
    assert check_examples([*rows, {"input_ids": [3, 4], "labels": [-100, 4]}], 8, 61)
