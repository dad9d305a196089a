"""Checkpoints: safetensors and JSON, with a manifest of hashes; whole or not there, and nothing in them is executed.

    checkpoints/step-N/   <group>.safetensors   tensors by name
                          state.json            values
                          manifest.json         {file name: sha256}

All checkpoints of a run are kept, so that any of them can be gone back to.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from .files import remove_leftovers, saving

MANIFEST = "manifest.json"
STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: ``tensors[group][name]``, and ``values`` that JSON can hold."""

    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any]


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write ``folder/step-N``; it gets that name once all of it is on the disk.

    Raises:
        LLMBuilderError: the disk is full or refuses; what was there before is untouched.
    """
    return write_checkpoint(folder / f"step-{step}", checkpoint)


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint's folder: as ``save_checkpoint``, under any name."""
    with saving(path) as temporary:
        temporary.mkdir()
        for group, tensors in checkpoint.tensors.items():
            save_file({name: value.contiguous() for name, value in tensors.items()}, temporary / f"{group}.safetensors")
        (temporary / STATE).write_text(json.dumps(checkpoint.values), encoding="utf-8")
        hashes = {file.name: file_hash(file) for file in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(hashes, indent=1), encoding="utf-8")
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint that ``find_fault`` found whole."""
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return Checkpoint(tensors, json.loads((path / STATE).read_text(encoding="utf-8")))


def newest_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that is whole; a warning names each newer one that is not. None where there is none.

    What an interrupted save left behind is removed.
    """
    remove_leftovers(folder)
    found = {int(path.name[5:]): path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)}
    for _, path in sorted(found.items(), reverse=True):
        fault = find_fault(path)
        if fault is None:
            return path
        warnings.warn(f"checkpoint {path} is skipped: {fault}", stacklevel=2)
    return None


def find_fault(path: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None: every file must be there, listed, and as its hash says."""
    try:
        hashes = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        names = {file.name for file in path.iterdir()} - {MANIFEST}
        if not isinstance(hashes, dict) or names != set(hashes) or STATE not in names:
            return f"its files are not those that {MANIFEST} lists"
        damaged = [name for name in sorted(names) if file_hash(path / name) != hashes[name]]
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return f"{damaged[0]} is damaged" if damaged else None


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split_states(states: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Methods' states as ``{"<method>/<name>": tensor}``, and the rest as ``{method: {name: value}}``."""
    tensors = {
        f"{method}/{name}": value
        for method, state in states.items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    values = {
        method: {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        for method, state in states.items()
    }
    return tensors, values


def join_states(tensors: Mapping[str, Tensor], values: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Undo ``split_states``."""
    states = {method: dict(state) for method, state in values.items()}
    for key, tensor in tensors.items():
        method, name = key.split("/", 1)
        states[method][name] = tensor.clone()
    return states
