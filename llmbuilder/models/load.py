"""One way to load a model, whatever it is stored as."""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import LLMBuilderError, nearest
from .dtypes import parse_dtype
from .gguf import from_gguf
from .hugging_face import from_pretrained
from .native import from_file, from_folder
from .save import MODEL_TYPE


def load_model(
    path: str | os.PathLike[str], dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> nn.Module:
    """Load a model with its tokenizer, by what ``path`` is.

    - a ``.pt`` file, or a folder with ``model.pt`` or the native ``config.json``: a :class:`GPT`;
    - a folder with any other ``config.json``, or the id of a model on the Hugging Face hub: a transformers model;
    - a ``.gguf`` file, or a folder that holds one: a transformers model with its weights unpacked.

    Nothing that a file holds is executed: pickles are read by torch's restricted unpickler, and code beside a model is
    never imported. Weights get storage of their own, aligned to 64 bytes, so that the same inputs give the same bits in
    the next process.

    Args:
        path: file, folder or hub id.
        dtype: "fp32", "bf16", "fp16", a torch dtype, or "auto": as stored; a quantised GGUF becomes bf16 where the
            device computes bf16 natively, else fp32.
        device: where the weights go.

    Returns:
        The model in evaluation mode; ``model.tokenizer`` is a fast tokenizer with a padding token (a native model
        without a stored tokenizer gets the byte-level one, or None where its vocabulary is too small for that).

    Raises:
        LLMBuilderError: there is no model at ``path``, or it is truncated, corrupt, unsafe or of no known kind.
        ConfigError: an unknown ``dtype``.
    """
    device = torch.device(device)
    model = _read(path, parse_dtype(dtype), device)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return model.to(device=device).eval()


def _read(path: str | os.PathLike[str], dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    place = Path(path).expanduser()
    if place.is_file():
        return _read_file(place, dtype, device)
    if place.is_dir():
        return _read_folder(place, dtype, device)
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(path)) and not _misses_in_folder(place):
        return from_pretrained(str(path), dtype)
    siblings = [str(entry) for entry in place.parent.iterdir()] if place.parent.is_dir() else []
    raise LLMBuilderError(f"there is no file or folder {place}{nearest(str(place), siblings)}")


def _misses_in_folder(place: Path) -> bool:
    """Whether `folder/name` names a folder that is here: then it is a path with a wrong end, and no hub id."""
    return len(place.parts) == 2 and place.parent.is_dir()


def _read_file(path: Path, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    if path.suffix == ".pt":
        return from_file(path, dtype)
    if path.suffix == ".gguf":
        return from_gguf(path, dtype, device)
    raise LLMBuilderError(f"{path} is no model file that is known (.pt, .gguf); give the folder that holds it")


def _read_folder(folder: Path, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    if (folder / "adapter_config.json").is_file():
        raise LLMBuilderError(_about_adapter(folder))
    if (folder / "config.json").is_file():
        config = _read_json(folder / "config.json")
        native = config.get("model_type") == MODEL_TYPE
        return from_folder(folder, config, dtype) if native else from_pretrained(folder, dtype)
    if (folder / "model.pt").is_file():
        return from_file(folder / "model.pt", dtype)
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return from_gguf(files[0], dtype, device)
    if files:
        names = ", ".join(file.name for file in files)
        raise LLMBuilderError(f"{folder} holds several GGUF files; give one of them: {names}")
    inside = [str(folder / name) for name in ("model", "adapter") if (folder / name).is_dir()]
    hint = f"; did you mean {' or '.join(inside)}?" if inside else ""
    raise LLMBuilderError(f"{folder} holds no model: no config.json, model.pt or .gguf file{hint}")


def _about_adapter(folder: Path) -> str:
    if (folder / "config.json").is_file():
        return f"{folder} holds an adapter beside the model; move the adapter into a folder of its own"
    base = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    return (
        f"{folder} holds an adapter, not a model; load its base model ({base or 'not named there'}) "
        "and put the adapter on it with load_adapter, or on the command line: --model BASE --adapter FOLDER"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LLMBuilderError(f"cannot read {path}: {error}; the model has to be saved or downloaded again") from error
    if not isinstance(content, dict):
        raise LLMBuilderError(f"{path} holds no JSON object; the model has to be saved or downloaded again")
    return content
