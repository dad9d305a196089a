"""How a run shows itself: a live bar on a terminal, plain lines elsewhere; both on standard error."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_LINES = 20
"""How often, at most, a run without a terminal reports its training loss."""


class Display:
    """Shows the steps of a run; a context manager, so that the terminal is left in order.

    Args:
        total: optimizer steps of the whole run.
        done: steps done when it starts.
    """

    def __init__(self, total: int, done: int = 0, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.total = total
        self._every = max(1, total // PLAIN_LINES)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=total, completed=done)

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, row: Mapping[str, Any]) -> None:
        """A step is done; ``row`` is its line of metrics.jsonl."""
        text = describe(row)
        self._bar.update(self._task, completed=row["step"], description=text)
        evaluated = "eval_loss" in row
        if evaluated or (not self.console.is_terminal and row["step"] % self._every == 0):
            self.say(f"step {row['step']}/{self.total}  {text}")


def describe(row: Mapping[str, Any]) -> str:
    """The numbers of a step that a person watches."""
    parts = [f"loss {row['loss']:.4f}", f"lr {row['lr']:.2e}", f"{row['tokens_per_s']:.0f} tokens/s"]
    if row.get("eval_loss") is not None:
        parts.append(f"evaluation loss {row['eval_loss']:.4f}")
    return "  ".join(parts)
