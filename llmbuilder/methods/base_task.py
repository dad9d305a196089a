"""The base tasks: what the model could do before, judged before and after."""

from collections.abc import Sequence
from typing import Any

from .base import Example, Run


class BaseTask:
    """Measures forgetting: by how much the loss on the base tasks' data has risen, in nats a token.

    The data are ``run.base_val``, else ``run.general``.
    """

    name = "base task"

    def before_task(self, run: Run) -> None:
        self._before = _loss(run)

    def after_task(self, run: Run) -> None:
        self._after = _loss(run)

    def results(self) -> dict[str, Any]:
        return {"forgetting": self._after - self._before}

    def state(self) -> dict[str, Any]:
        return {"before": self._before}

    def load_state(self, state: dict[str, Any]) -> None:
        self._before = state["before"]


def _loss(run: Run) -> float:
    data: Sequence[Example] | None = run.general if run.base_val is None else run.base_val
    assert data is not None and run.loss is not None
    return run.loss(data)
