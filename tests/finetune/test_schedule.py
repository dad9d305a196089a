"""Rates by formula."""

import math

import pytest

from llmbuilder.finetune.config import FineTuningConfig
from llmbuilder.finetune.schedule import Schedule


def test_warmup_is_linear_and_its_first_step_moves() -> None:
    schedule = Schedule(FineTuningConfig(learning_rate=0.4, scheduler="constant", warmup_steps=4), 10, 10)
    assert [schedule(step) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4], rel=1e-15)


def test_warmup_ratio_is_a_share_of_all_steps_rounded_up() -> None:
    schedule = Schedule(FineTuningConfig(learning_rate=1.0, scheduler="constant", warmup_ratio=0.25), 10, 10)
    assert [schedule(step) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0], rel=1e-15)


def test_linear_falls_to_the_floor_in_equal_steps() -> None:
    schedule = Schedule(FineTuningConfig(learning_rate=2.0, scheduler="linear", min_lr_ratio=0.1), 5, 5)
    falls = [schedule(step) - schedule(step + 1) for step in range(4)]
    assert schedule(0) == 2.0
    assert falls == pytest.approx([2.0 * 0.9 / 5] * 4, rel=1e-12)
    assert schedule(4) - falls[0] == pytest.approx(0.2, rel=1e-12)


def test_cosine_is_half_way_in_the_middle() -> None:
    config = FineTuningConfig(learning_rate=1.0, scheduler="cosine", min_lr_ratio=0.2, warmup_steps=2)
    schedule = Schedule(config, 12, 12)
    assert schedule(2) == 1.0
    assert schedule(7) == pytest.approx(0.2 + 0.8 / 2, rel=1e-12)
    assert schedule(11) == pytest.approx(0.2 + 0.8 * (1 - math.cos(math.pi / 10)) / 2, rel=1e-9)


@pytest.mark.parametrize("course", ["linear", "cosine"])
def test_without_warmup_the_course_is_transformers(course: str) -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    theirs = get_scheduler(course, optimizer, num_warmup_steps=0, num_training_steps=7)
    schedule = Schedule(FineTuningConfig(learning_rate=0.3, scheduler=course), 7, 7)
    for step in range(7):
        assert schedule(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        theirs.step()


def test_warmup_longer_than_the_run_never_reaches_the_peak() -> None:
    schedule = Schedule(FineTuningConfig(learning_rate=1.0, warmup_steps=10), 4, 4)
    assert [schedule(step) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
