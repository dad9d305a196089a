"""Forgetting, as the rise of the loss on the base tasks."""

import pytest
import torch

from llmbuilder.methods import BaseTask, Run

BASE, GENERAL = [{"input_ids": [1, 2], "labels": [1, 2]}], [{"input_ids": [3, 4], "labels": [3, 4]}]


@pytest.mark.parametrize(("base_val", "judged"), [(BASE, BASE), (None, GENERAL)])
def test_validation_on_base_tasks_judges_before_and_after(base_val: list | None, judged: list) -> None:
    asked, losses = [], iter([1.5, 2.25])

    def loss(data: object) -> float:
        asked.append(data)
        return next(losses)

    run = Run(torch.nn.Linear(1, 1), general=GENERAL, base_val=base_val, loss=loss)
    method, resumed = BaseTask(), BaseTask()
    method.before_task(run)
    resumed.load_state(method.state())
    resumed.after_task(run)
    assert resumed.results() == {"forgetting": 0.75}
    assert asked == [judged, judged]
