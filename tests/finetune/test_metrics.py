"""metrics.jsonl, TensorBoard and the picture say the same."""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from llmbuilder.finetune.metrics import MetricsLog, draw_loss, read_rows


def row(step: int, **more: float) -> dict[str, Any]:
    return {"step": step, "epoch": step / 4, "loss": 1.0 / step} | more


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return {
        key: [(event.step, event.value) for event in accumulator.Scalars(key)] for key in accumulator.Tags()["scalars"]
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_object_a_line_and_the_same_numbers_in_tensorboard(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    rows = [row(1), row(2, eval_loss=3.5), row(3)]
    for each in rows:
        log.add(each)
    log.close()
    assert lines(tmp_path) == rows == log.rows
    seen = events(tmp_path)
    assert seen["loss"] == [(1, pytest.approx(1.0)), (2, pytest.approx(0.5)), (3, pytest.approx(1 / 3))]
    assert seen["eval_loss"] == [(2, 3.5)]


def test_rows_are_on_the_disk_as_soon_as_they_are_added(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.add(row(1))
    assert lines(tmp_path) == [row(1)]
    log.close()


def test_opening_cuts_back_to_the_steps_that_are_done_in_both_places(tmp_path: Path) -> None:
    first = MetricsLog(tmp_path, 0)
    for step in range(1, 6):
        first.add(row(step))
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a crash in the middle of a line
    again = MetricsLog(tmp_path, 3)
    again.add(row(4, eval_loss=9.0))
    again.close()
    wanted = [row(1), row(2), row(3), row(4, eval_loss=9.0)]
    assert lines(tmp_path) == wanted == again.rows
    assert [step for step, _ in events(tmp_path)["loss"]] == [1, 2, 3, 4]
    assert events(tmp_path)["eval_loss"] == [(4, 9.0)]


@pytest.mark.parametrize("foreign", ["null", "5", '{"loss": 1.0}', '{"step": "x"}'])
def test_rows_end_where_a_line_is_none(tmp_path: Path, foreign: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{foreign}\n{{"step": 2}}\n')
    assert read_rows(path, 2) == [{"step": 1}]


def test_blank_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\n  \n{"step": 2}\n')
    assert [row["step"] for row in read_rows(path, 2)] == [1, 2]


def test_rows_that_are_lost_are_missed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl holds 1 of 3 steps done"):
        log = MetricsLog(tmp_path, 3)
    log.close()
    assert log.rows == [{"step": 1}]


def test_a_new_run_starts_empty(tmp_path: Path) -> None:
    first = MetricsLog(tmp_path, 0)
    first.add(row(1))
    first.close()
    MetricsLog(tmp_path, 0).close()
    assert lines(tmp_path) == [] and events(tmp_path) == {}


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.add(row(1, eval_perplexity=math.inf, extra_loss=math.nan))
    log.close()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert lines(tmp_path)[0]["eval_perplexity"] is None


def test_without_a_folder_rows_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = MetricsLog(None, 0)
    log.add(row(1))
    log.sync()
    log.close()
    assert log.rows == [row(1)] and list(tmp_path.iterdir()) == []


def test_the_picture_shows_both_losses(tmp_path: Path) -> None:
    rows = [row(step) for step in range(1, 9)]
    draw_loss(tmp_path / "training.png", rows)
    draw_loss(tmp_path / "both.png", [each | ({"eval_loss": 2.0} if each["step"] % 4 == 0 else {}) for each in rows])
    draw_loss(tmp_path / "none.png", [])
    pictures = {name: matplotlib.image.imread(tmp_path / f"{name}.png") for name in ("training", "both", "none")}
    # White axes, then a blue line, then an orange one besides.
    colours = {
        name: {tuple(pixel) for pixel in (p[..., :3] * 255).astype(int).reshape(-1, 3)} for name, p in pictures.items()
    }
    blue, orange = (31, 119, 180), (255, 127, 14)
    assert [blue in colours[name] for name in ("none", "training", "both")] == [False, True, True]
    assert [orange in colours[name] for name in ("none", "training", "both")] == [False, False, True]
