"""Replay: the buffer is a uniform sample, the share is exact."""

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmbuilder.methods import Replay, Run
from llmbuilder.methods.replay import SOURCE


def task(start: int, count: int) -> list[dict[str, list[int]]]:
    """Examples that can be told apart."""
    return [{"input_ids": [n, 0], "labels": [n, 0]} for n in range(start, start + count)]


def run_of(data: list[dict[str, list[int]]], seed: int = 0) -> Run:
    return Run(torch.nn.Linear(1, 1), seed, {"train": data}, batch_size=4)


def after(tasks: list[list[dict[str, list[int]]]], sizes: list[int], seed: int) -> list[int]:
    """Which examples the buffer holds after these tasks, each in a run of its own with a buffer of its own size."""
    past = None
    for data, size in zip(tasks, sizes, strict=True):
        replay = Replay(size, 0.5)
        if past is not None:
            replay.load_past(past)
        run = run_of(data, seed)
        replay.prepare(run)
        replay.after_task(run)
        past = replay.past()
    assert past is not None and past["offered"] == sum(map(len, tasks))
    return [example["input_ids"][0] for example in past["examples"]]


@pytest.mark.parametrize("sizes", [[12, 12, 12], [17, 20, 12], [15, 8, 8]], ids=["equal", "smaller last", "smaller"])
def test_memory_buffer_size_keeps_a_uniform_sample_of_all_tasks(sizes: list[int]) -> None:
    """Every example of three tasks of different length is kept equally often: χ² over 2,000 seeds. Also where a run's
    buffer is smaller than that of the run before."""
    tasks = [task(0, 17), task(17, 5), task(22, 28)]
    size, seeds = sizes[-1], 2000
    counts = torch.zeros(50)
    for seed in range(seeds):
        kept = after(tasks, sizes, seed)
        assert len(set(kept)) == size
        counts[kept] += 1
    expected = seeds * size / 50
    # Within a seed examples exclude each other, which makes counts vary less than independent draws: by (1 - k/n).
    chi2 = float(((counts - expected) ** 2 / (expected * (1 - size / 50))).sum()) * 49 / 50
    # Wilson and Hilferty: (χ²/d)^(1/3) is about normal with mean 1 - 2/(9d) and variance 2/(9d).
    assert abs((chi2 / 49) ** (1 / 3) - (1 - 2 / (9 * 49))) < 4 * math.sqrt(2 / (9 * 49))


def test_a_buffer_that_is_not_full_holds_everything() -> None:
    assert after([task(0, 3), task(3, 4)], [10, 10], 0) == list(range(7))


@pytest.mark.parametrize("frequency", [0.1, 0.25, 1 / 3, 0.5, 0.9, 0.07])
def test_replay_frequency_is_exact_after_every_example(frequency: float) -> None:
    """⌊ρn + ½⌋ of the first n, over three epochs; all examples of the task come in each, in the plan's order."""
    replay = Replay(5, frequency)
    replay.load_past({"examples": task(100, 5), "offered": 5})
    run = run_of(task(0, 23))
    replay.prepare(run)
    assert run.sources[SOURCE] == task(100, 5)
    n = replayed = 0
    lengths = set()
    for epoch in range(3):
        order = [("train", (7 * i + epoch) % 23) for i in range(23)]
        plan = list(replay.batches(epoch, [order[i : i + 4] for i in range(0, 23, 4)]))
        lengths.add(len(plan))
        assert {len(keys) for keys in plan[:-1]} == {4} and 1 <= len(plan[-1]) <= 4
        own = [key for keys in plan for key in keys if key[0] == "train"]
        assert own[:22] == order[:22]
        for keys in plan:
            for key in keys:
                n += 1
                replayed += key[0] == SOURCE
                assert replayed == math.floor(Fraction(str(frequency)) * n + Fraction(1, 2))
    assert len(lengths) == 1


def test_batches_are_whole_where_the_task_has_too_few_examples_for_one() -> None:
    replay = Replay(5, 0.9)
    replay.load_past({"examples": task(100, 5), "offered": 5})
    replay.prepare(run_of(task(0, 3)))
    plan = [[("train", 0), ("train", 1), ("train", 2)]]
    assert [len(keys) for keys in replay.batches(0, plan)] == [4] * 7 + [2]  # 3 of 30 are the task's


def test_replayed_examples_take_turns() -> None:
    replay = Replay(7, 0.5)
    replay.load_past({"examples": task(0, 7), "offered": 7})
    replay.prepare(run_of(task(50, 14)))
    keys = [
        key for epoch in range(2) for keys in replay.batches(epoch, [[("train", i)] for i in range(14)]) for key in keys
    ]
    turns = [index for source, index in keys if source == SOURCE]
    assert len(turns) == 28 and all(sorted(turns[i : i + 7]) == list(range(7)) for i in (0, 7, 14, 21))
    assert turns[:7] != turns[7:14]


def test_a_smaller_buffer_holds_no_more_and_a_resumed_run_the_same() -> None:
    past = {"examples": task(0, 50), "offered": 90}
    buffers = []
    for seed in (3, 3, 4):
        replay, run = Replay(5, 0.5), run_of(task(50, 4), seed)
        replay.load_past(past)
        replay.prepare(run)
        assert run.sources[SOURCE] is replay.examples and len(replay.examples) == 5
        buffers.append([example["input_ids"][0] for example in replay.examples])
        replay.after_task(run)
        assert len(replay.past()["examples"]) == 5 and replay.past()["offered"] == 94
    assert buffers[0] == buffers[1] != buffers[2] and set(buffers[0]) < set(range(50))
    assert past["examples"] == task(0, 50)  # the earlier run keeps its own


def test_arrays_and_tensors_are_kept_as_plain_numbers() -> None:
    data: Any = [
        {"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([-100, 2]), "weights": torch.tensor([1.0, 0.5])},
        {"input_ids": np.array([3, 4]), "labels": [np.int64(3), np.int64(4)], "source": Path("a.txt")},
        {"input_ids": [5, 6], "labels": (5, 6)},
    ]
    replay, run = Replay(5, 0.5), run_of(data)
    replay.prepare(run)
    replay.after_task(run)
    wanted = [
        {"input_ids": [1, 2], "labels": [-100, 2], "weights": [1.0, 0.5]},
        {"input_ids": [3, 4], "labels": [3, 4]},
        {"input_ids": [5, 6], "labels": [5, 6]},
    ]
    assert json.loads(json.dumps(replay.past()["examples"])) == replay.past()["examples"] == wanted


def test_the_first_task_replays_nothing() -> None:
    replay = Replay(5, 0.5)
    run = run_of(task(0, 6))
    replay.prepare(run)
    plan = [[("train", 0), ("train", 1)], [("train", 2)]]
    assert list(replay.batches(0, plan)) == plan and SOURCE not in run.sources


def test_the_running_task_draws_from_the_buffer_that_it_began_with() -> None:
    replay = Replay(3, 0.5)
    replay.load_past({"examples": task(0, 3), "offered": 3})
    run = run_of(task(10, 40))
    replay.prepare(run)
    replay.after_task(run)
    assert run.sources[SOURCE] == task(0, 3) and replay.examples != task(0, 3)
