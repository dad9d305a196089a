"""Several tasks as one data set: shares, order, epochs, and parts that share no example."""

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

import llmbuilder as lb
from llmbuilder.data import MultiTaskDataset, TaskDataset, TextDataset, load_dataset, split
from llmbuilder.errors import ConfigError, LLMBuilderError
from llmbuilder.finetune import FineTuningConfig
from llmbuilder.models import byte_tokenizer


def rows(count: int, token: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": [token, index], "labels": [token, index]} for index in range(count)]


def mixed(seed: int = 0, sizes: tuple[int, ...] = (40, 90, 11)) -> MultiTaskDataset:
    shares = (0.4, 0.3, 0.3)
    return MultiTaskDataset([(f"task {n}", rows(size, n), shares[n]) for n, size in enumerate(sizes)], seed)


def test_shares_hold_from_the_start() -> None:
    data = mixed()
    seen: Counter[int] = Counter()
    for n in range(len(data)):
        seen[data[n]["input_ids"][0]] += 1
        for task, share in enumerate((0.4, 0.3, 0.3)):
            assert abs(seen[task] - share * (n + 1)) < 1
    assert len(data) == 300 and seen == {0: 120, 1: 90, 2: 90}


def test_every_example_is_seen_and_each_of_a_task_as_often_give_or_take_one() -> None:
    data = mixed()
    for task, size in enumerate((40, 90, 11)):
        times = Counter(data[n]["input_ids"][1] for n in range(len(data)) if data[n]["input_ids"][0] == task)
        assert len(times) == size and max(times.values()) - min(times.values()) <= 1
    assert [data.task_of(n) for n in range(9)] == [f"task {data[n]['input_ids'][0]}" for n in range(9)]


def test_the_seed_fixes_the_order() -> None:
    def order(data: MultiTaskDataset) -> list[Any]:
        return [data[n]["input_ids"] for n in range(len(data))]

    assert order(mixed()) == order(mixed()) != order(mixed(seed=1))
    own = [ids[1] for ids in order(mixed()) if ids[0] == 1]
    assert any(after < before for before, after in pairwise(own))


def test_shares_are_divided_by_their_sum_exactly() -> None:
    data = MultiTaskDataset([("a", rows(5, 0), 2), ("b", rows(5, 1), 1)])
    assert len(data) == 15 and sum(data.task_of(n) == "a" for n in range(15)) == 10
    tenths = MultiTaskDataset([(str(n), rows(1, n), 0.1) for n in range(10)])
    assert len(tenths) == 10


def test_binding_reports_and_pairs_go_to_each_task(tmp_path: Any) -> None:
    (tmp_path / "a.txt").write_text("some words to go on with")
    data = lb.MultiTaskDataset(
        [
            ("text", TextDataset(tmp_path / "a.txt", block_size=8), 1),
            ("qa", TaskDataset([{"question": "Why?", "answer": "So."}] * 3, "question_answering"), 1),
        ]
    )
    data.bind(byte_tokenizer(), FineTuningConfig(max_seq_length=64))
    assert len(data) == 6 and data.report.examples == 6 and data.report.rows == 4
    assert "Task text: " in str(data.report) and "Task qa: " in str(data.report)
    pairs = data.generation_pairs(4)
    assert len(pairs) == 4 and [reference for _, reference in pairs][2:] == ["So.", "So."]
    assert data.metric == "next_token" and load_dataset(data, FineTuningConfig()) is data
    index = next(n for n in range(6) if data.task_of(n) == "qa")
    assert data.generation_pair(index)[1] == "So."


def test_parts_are_divided_task_by_task() -> None:
    texts = {name: TextDataset([{"text": f"{name} {n}"} for n in range(10)], block_size=16) for name in "ab"}
    data = MultiTaskDataset([(name, text, 0.5) for name, text in texts.items()])
    data.bind(byte_tokenizer(), FineTuningConfig())
    train, val = split(data, 0.2, seed=0)
    assert {name: len(part) for name, part in train.tasks.items()} == {"a": 8, "b": 8}
    assert {name: len(part) for name, part in val.tasks.items()} == {"a": 2, "b": 2}
    held = {tuple(val[n]["input_ids"]) for n in range(len(val))}
    assert len(held) == 4 and not held & {tuple(train[n]["input_ids"]) for n in range(len(train))}
    with pytest.raises(ConfigError, match="a should be data sets of llmbuilder"):
        split(MultiTaskDataset([("a", rows(4, 0), 1)]), 0.5, seed=0)


@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        ([], "needs tasks of different names"),
        ([("a", rows(1, 0), 1), ("a", rows(1, 0), 1)], "different names"),
        ([("", rows(1, 0), 1)], "different names"),
        ([("a", rows(1, 0), 0)], "must be positive, got a: 0"),
        ([("a", rows(1, 0), float("nan"))], "must be positive"),
    ],
)
def test_tasks_that_mean_nothing_are_refused(tasks: list[Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        MultiTaskDataset(tasks)


def test_a_task_without_examples_is_named() -> None:
    with pytest.raises(LLMBuilderError, match="b has no examples"):
        len(MultiTaskDataset([("a", rows(1, 0), 1), ("b", [], 1)]))
