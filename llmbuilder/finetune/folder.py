"""The folder of a run: what lies in it, and when a run may write there."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import ConfigError, LLMBuilderError
from .checkpoint import find_fault
from .files import explained, remove, remove_leftovers, write_text
from .results import Results

CONTENT = (
    *("adapter", "adapters", "model", "heads", "past", "checkpoints", "metrics.jsonl", "tensorboard", "config.yaml"),
    *("results.json", "loss.png"),
)

NUMBERS = ("base_perplexity", "final_perplexity", "improvement_percentage", "training_time")  # of results.json
MARK = "# The settings of a run of llmbuilder, as resolved.\n"


class RunFolder:
    """A run's folder, by name of content: adapter/ (PEFT format), adapters/TASK/ or model/, heads/ (of tasks), past/
    (what a run that goes on from this one needs to know), checkpoints/step-N/, metrics.jsonl, tensorboard/,
    config.yaml (as resolved), results.json, loss.png.

    Raises:
        LLMBuilderError: it holds a run and neither ``resume`` nor ``overwrite`` says what to do with it.
    """

    def __init__(self, path: Path, *, resume: bool, overwrite: bool) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.past = path / "past"
        if path.exists() and not path.is_dir():
            raise LLMBuilderError(f"output_dir {path} is a file; give a folder")
        held = [name for name in CONTENT if (path / name).exists()]
        if held and not (resume or overwrite):
            raise LLMBuilderError(
                f"output_dir {path} holds a run already ({', '.join(held)}): "
                "go on with it by resume, replace it by overwrite, or give another folder"
            )
        if held and not self._is_marked():
            raise LLMBuilderError(
                f"output_dir {path} holds {', '.join(held)}, and no config.yaml that a run would have written: "
                "it may be someone's work; give another folder"
            )

    def _is_marked(self) -> bool:
        """Whether the config.yaml there is a run's."""
        try:
            return (self.path / "config.yaml").read_bytes().startswith(MARK.encode())
        except OSError:
            return False

    def begin(self, config_yaml: str) -> None:
        """Make the folder that of a new run: what an earlier one left there goes. Comes once nothing can stop the run
        from starting."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LLMBuilderError(
                f"output_dir {self.path}: cannot be made ({error.strerror}); give another folder"
            ) from error
        with explained(self.path):
            for name in CONTENT:
                if name != "config.yaml":  # it marks a run's folder until the new one takes its place
                    remove(self.path / name)
        write_text(self.path / "config.yaml", MARK + config_yaml)

    def tidy(self) -> None:
        """Remove what a crash left half written: a run that goes on writes it again."""
        for name in CONTENT:
            remove_leftovers(self.path, name)
        remove_leftovers(self.path / "adapters")

    def save_results(self, values: dict[str, Any]) -> None:
        """results.json, the last file of a run: where it is, the run is over."""
        write_text(self.path / "results.json", json.dumps(values, indent=1) + "\n")

    def exported(self) -> list[Path]:
        """The folders of what was trained."""
        return [self.path / name for name in ("adapter", "adapters", "model", "heads") if (self.path / name).is_dir()]

    def results(self, rows: list[dict[str, Any]]) -> Results | None:
        """What results.json holds, with the rows of metrics.jsonl; None while the run is not over, or where that file,
        what was trained or the past is lost or damaged."""
        try:
            values = json.loads((self.path / "results.json").read_text(encoding="utf-8"))
            results = Results.from_dict(values | {name: float(values[name]) for name in NUMBERS}, rows)
            for file in (file for folder in self.exported() for file in folder.rglob("*.safetensors")):
                with safe_open(file, "pt"):  # as long as its header says
                    pass
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError, SafetensorError):
            return None
        return results if self.exported() and self.past.is_dir() and find_fault(self.past) is None else None


def open_folder(path: Path | None, resume: bool, overwrite: bool, continue_from: Any) -> RunFolder | None:
    """The folder that a run writes into, None where it writes nothing.

    Raises:
        ConfigError: what is asked for needs a folder, or contradicts itself.
        LLMBuilderError: as ``RunFolder``.
    """
    if resume and overwrite:
        raise ConfigError("resume and overwrite contradict each other: give one of them")
    if path is None:
        if resume or overwrite:
            raise ConfigError(f"{'resume' if resume else 'overwrite'} needs an output_dir")
        return None
    if isinstance(continue_from, str | os.PathLike) and Path(continue_from).resolve().is_relative_to(path.resolve()):
        raise ConfigError(f"continue_from and output_dir are both in {path}: a next task needs a folder of its own")
    return RunFolder(path, resume=resume, overwrite=overwrite)
