"""A bar on a terminal, lines elsewhere."""

import io
from typing import Any

from rich.console import Console

from llmbuilder.finetune.display import Display


def shown(terminal: bool, rows: list[dict[str, Any]], total: int = 100) -> str:
    stream = io.StringIO()
    with Display(total, console=Console(file=stream, force_terminal=terminal, width=120)) as display:
        for row in rows:
            display.step(row)
    return stream.getvalue()


def row(step: int, **more: float) -> dict[str, Any]:
    return {"step": step, "loss": 2.5, "lr": 1e-4, "tokens_per_s": 1234.0} | more


def test_without_a_terminal_a_run_takes_twenty_plain_lines() -> None:
    lines = shown(False, [row(step) for step in range(1, 101)]).splitlines()
    assert len(lines) == 20
    assert lines[1] == "step 10/100  loss 2.5000  lr 1.00e-04  1234 tokens/s"


def test_every_evaluation_is_shown() -> None:
    text = shown(False, [row(3, eval_loss=1.25)])
    assert text.splitlines() == ["step 3/100  loss 2.5000  lr 1.00e-04  1234 tokens/s  evaluation loss 1.2500"]


def test_a_terminal_gets_a_live_bar_that_counts_steps() -> None:
    text = shown(True, [row(step) for step in range(1, 42)])
    assert "41/100" in text and "\x1b[" in text
    assert "step 5/100" not in text
