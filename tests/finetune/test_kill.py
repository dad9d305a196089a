"""A process that learns two tasks by several methods is killed anywhere and started again; what it leaves equals,
bit for bit, what it leaves undisturbed: weights, optimizer, metrics, Fisher information, anchors, replay buffer."""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import crashing
import killing
from killing import STEPS

TUNER, CHECKPOINT, PEFT = "llmbuilder.finetune.tuner", "llmbuilder.finetune.checkpoint", "llmbuilder.nn.peft_format"
SAVES = 3
"""Checkpoints of a task: after steps 2, 4 and 5."""
SAVING = [(TUNER, "save_checkpoint", SAVES + 2)]
BETWEEN = {
    "before the first task is over": [("llmbuilder.finetune.folder:RunFolder", "save_results", 1)],
    "before the second task is set up": [(f"{TUNER}:FineTuner", "__init__", 2)],
    "before its first step": [(f"{TUNER}:FineTuner", "_step", STEPS + 1)],
}
WITHIN = {
    "before the first task is counted as past": [(f"{TUNER}:FineTuner", "end_task", 1)],
    "while the past is written": [(f"{TUNER}:Past", "save", 1), (CHECKPOINT, "file_hash", 1)],
    "before the weights are written": [(f"{TUNER}:Methods", "export", 1)],
    "in the middle of the second task": [(TUNER, "clip_gradients", STEPS + 3)],
    "while a checkpoint is written": [*SAVING, (CHECKPOINT, "save_file", 3)],
    "while its manifest is made": [*SAVING, (CHECKPOINT, "file_hash", 4)],
    "before it has its name": [*SAVING, ("pathlib:Path", "replace", 1)],
}
PLACES = {
    "command line": BETWEEN | WITHIN,
    "python": BETWEEN | {"while its past gets a name": [(f"{TUNER}:Past", "save", 2), ("pathlib:Path", "replace", 1)]},
    "heads and adapters": BETWEEN
    | {"before an adapter is written": [(f"{TUNER}:Methods", "export", 1), (PEFT, "save_file", 2)]},
}
KEPT = {"fisher", "anchor", "ids", "bounds", "starts"}  # starts: 0 for texts that are learnt whole
CASES: dict[str, tuple[killing.Program, dict[str, Any]]] = {
    "command line": (killing.by_command_line, {}),
    "python": (killing.by_python, {}),
    "heads and adapters": (killing.by_command_line, killing.OF_TASKS),
}
KILLS = [(case, place) for case, places in PLACES.items() for place in places]


def contents(folder: Path) -> dict[str, Any]:
    """All tensors and values in the files of both runs, but for times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = load_file(path)
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in rows]
        elif path.suffix == ".json" and path.name != "manifest.json":
            values = json.loads(path.read_text())
            values.get("progress", values).pop("seconds" if "progress" in values else "training_time", None)
            if "config" in values:
                del values["config"]["output_dir"]
            found[name] = json.dumps(values)  # in which NaN equals itself
    return found


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The names of files that are not in both, or not the same in both."""

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, dict) and isinstance(other, dict):
            return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other

    return [
        name for name in found | wanted if not (name in found and name in wanted and same(found[name], wanted[name]))
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    killing.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def processes() -> crashing.Processes:
    return crashing.Processes()


@pytest.fixture(scope="module")
def whole(home: Path, processes: crashing.Processes) -> Callable[[str], dict[str, Any]]:
    """What a process leaves that nothing disturbs."""

    @functools.cache
    def make(case: str) -> dict[str, Any]:
        program, settings = CASES[case]
        assert processes.run(killing.run, program, home, home / case, **settings) == 0
        found = contents(home / case)
        assert len(found["first/metrics.jsonl"]) == len(found["second/metrics.jsonl"]) == STEPS
        past = found["second/past/methods.safetensors"]
        assert {name.split("/")[1] for name in past} == (set() if settings else KEPT)
        assert all(value.any() for name, value in past.items() if not name.endswith("/starts"))
        return found

    return make


@pytest.mark.parametrize(("case", "place"), KILLS, ids=map(", ".join, KILLS))
def test_killed_and_started_again_it_leaves_the_same(
    home: Path, tmp_path: Path, processes: crashing.Processes, whole: Any, case: str, place: str
) -> None:
    (program, settings), wanted = CASES[case], whole(case)
    assert processes.run(killing.run, program, home, tmp_path / "run", *PLACES[case][place], **settings) == -9
    assert differences(contents(tmp_path / "run"), wanted)
    killing.run(program, home, tmp_path / "run", **settings)
    assert differences(contents(tmp_path / "run"), wanted) == []


@pytest.mark.parametrize("case", CASES)
def test_started_again_when_all_is_done_it_changes_nothing(home: Path, whole: Any, case: str) -> None:
    (program, settings), wanted = CASES[case], whole(case)
    written = [(path, path.stat().st_mtime_ns) for path in (home / case).glob("*/results.json")]
    killing.run(program, home, home / case, **settings)
    assert differences(contents(home / case), wanted) == []
    assert len(written) == 2 and written == [(path, path.stat().st_mtime_ns) for path, _ in written]
