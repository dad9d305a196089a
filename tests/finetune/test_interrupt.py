"""Ctrl-C ends a run wherever it strikes, and leaves a program's own handler alone."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from llmbuilder.finetune import FineTuner
from llmbuilder.finetune.interrupt import interruptible

sys.path.insert(0, str(Path(__file__).parent))
import crashing


class Struck:
    """Presses Ctrl-C while it is destroyed, where Python drops the exception."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_in_a_destructor_ends_the_run_after_the_step(tmp_path: Path) -> None:
    config = crashing.make_config(tmp_path / "run")
    tuner = FineTuner(crashing.make_model(), crashing.make_data(22, 1), crashing.make_data(5, 2), config)

    def strike(*_: Any) -> None:
        if tuner.progress.step == 3:
            Struck()

    tuner.optimizer.register_step_pre_hook(strike)
    with pytest.warns(UserWarning, match="interrupted after step 4"), pytest.raises(KeyboardInterrupt):
        tuner.train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_program_s_own_handler_stays() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with interruptible() as check:
            os.kill(os.getpid(), signal.SIGINT)
            check()
        assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_that_a_library_makes_of_ctrl_c_ends_the_run_as_ctrl_c_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the last step, while the results are written; the run can be resumed."""

    def draw(*_: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("invalid bounding box") from None

    monkeypatch.setattr("llmbuilder.finetune.tuner.draw_loss", draw)
    config = crashing.make_config(tmp_path / "run")
    data = crashing.make_data(22, 1), crashing.make_data(5, 2)
    with pytest.warns(UserWarning, match="interrupted after step 12"), pytest.raises(KeyboardInterrupt):
        FineTuner(crashing.make_model(), *data, config).train()
    monkeypatch.undo()
    assert not (tmp_path / "run" / "results.json").exists()
    assert FineTuner(crashing.make_model(), *data, config, resume=True).train().steps == 12
