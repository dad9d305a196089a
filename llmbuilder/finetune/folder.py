"""The folder of a run: what lies in it, and when a run may write there."""

import json
from pathlib import Path
from typing import Any

from ..errors import LLMBuilderError
from .files import remove, write_text

CONTENT = ("adapter", "model", "checkpoints", "metrics.jsonl", "tensorboard", "config.yaml", "results.json", "loss.png")


class RunFolder:
    """A run's folder, by name of content: adapter/ (PEFT format) or model/, checkpoints/step-N/, metrics.jsonl,
    tensorboard/, config.yaml (as resolved), results.json, loss.png.

    Raises:
        LLMBuilderError: it holds a run and neither ``resume`` nor ``overwrite`` says what to do with it.
    """

    def __init__(self, path: Path, *, resume: bool, overwrite: bool) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        if path.exists() and not path.is_dir():
            raise LLMBuilderError(f"output_dir {path} is a file; give a folder")
        held = [name for name in CONTENT if (path / name).exists()]
        if held and not (resume or overwrite):
            raise LLMBuilderError(
                f"output_dir {path} holds a run already ({', '.join(held)}): "
                "go on with it by resume, replace it by overwrite, or give another folder"
            )

    def begin(self, config_yaml: str) -> None:
        """Make the folder that of a new run: what an earlier one left there goes."""
        self.path.mkdir(parents=True, exist_ok=True)
        for name in CONTENT:
            remove(self.path / name)
        write_text(self.path / "config.yaml", config_yaml)

    def save_results(self, values: dict[str, Any]) -> None:
        """results.json, the last file of a run: where it is, the run is over."""
        write_text(self.path / "results.json", json.dumps(values, indent=1) + "\n")

    def results(self) -> dict[str, Any] | None:
        """What results.json holds; None while the run is not over, or where the file is damaged."""
        try:
            return json.loads((self.path / "results.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
