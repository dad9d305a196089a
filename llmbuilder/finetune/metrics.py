"""What is measured at each step: metrics.jsonl, the same as TensorBoard events, and the picture of the loss."""

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import explained, remove, saving, write_text

Row = dict[str, Any]


class MetricsLog:
    """metrics.jsonl: one JSON object a line, one line an optimizer step; the same numbers go to TensorBoard.

    Opening it cuts it back to ``steps`` rows, and TensorBoard's events are written anew from those rows: a run that
    goes on from a checkpoint forgets what came after it.

    Args:
        folder: the run's; None keeps the rows in memory only.
        steps: how many optimizer steps are done.

    Attributes:
        rows: the objects, as read back by ``json``.
    """

    def __init__(self, folder: Path | None, steps: int) -> None:
        self.rows: list[Row] = []
        self._sinks: tuple[Any, Any] | None = None
        if folder is None:
            return
        path = folder / "metrics.jsonl"
        kept = read_rows(path, steps)
        if len(kept) < steps:
            warnings.warn(f"{path} holds {len(kept)} of {steps} steps done: the others' rows are lost", stacklevel=3)
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        remove(folder / "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.rows = kept
        self._sinks = path.open("a", encoding="utf-8"), SummaryWriter(str(folder / "tensorboard"))
        for row in kept:
            self._add_events(row)

    def add(self, row: Row) -> None:
        """Append a row; a number that is not finite becomes null, which every JSON reader knows."""
        row = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
        self.rows.append(row)
        if self._sinks is not None:
            with explained(Path(self._sinks[0].name)):
                self._sinks[0].write(json.dumps(row) + "\n")
                self._sinks[0].flush()
                self._add_events(row)

    def _add_events(self, row: Row) -> None:
        assert self._sinks is not None
        for key, value in row.items():
            if key != "step" and value is not None:
                self._sinks[1].add_scalar(key, value, row["step"])

    def sync(self) -> None:
        """Have the rows on the disk before a checkpoint counts on them."""
        if self._sinks is not None:
            with explained(Path(self._sinks[0].name)):
                os.fsync(self._sinks[0].fileno())
                self._sinks[1].flush()

    def close(self) -> None:
        """Close both files."""
        for sink in self._sinks or ():
            sink.close()


def read_rows(path: Path, steps: int) -> list[Row]:
    """The rows of the first ``steps`` steps; from a line on that is none, cut short by a crash say, nothing counts."""
    rows: list[Row] = []
    if steps == 0 or not path.exists():
        return rows
    for line in filter(str.strip, path.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        if row["step"] <= steps:
            rows.append(row)
    return rows


def draw_loss(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw training and evaluation loss over the steps into a PNG, without touching matplotlib's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss (nats a token)")
    for key, label, marker in (("loss", "training", ""), ("eval_loss", "evaluation", "o")):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, label=label)
    axes.grid(alpha=0.3)
    if rows:
        axes.legend()
    with saving(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)
