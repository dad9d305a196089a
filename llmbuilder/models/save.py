"""Saving a whole model so that it is there completely or not at all."""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import LLMBuilderError
from .gpt import GPT

MODEL_TYPE = "llmbuilder-gpt"
# What a saved model consists of: a folder with nothing else in it may be replaced by a new save.
_OWN_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "*.jinja")
_OWN_TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")


def save_model(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model and its tokenizer; :func:`load_model` reads them back bit for bit.

    A native model becomes one file when ``path`` ends in ``.pt``, else a folder (``config.json``,
    ``model.safetensors``, ``tokenizer.json``); a Hugging Face model becomes a folder in its own format. All is written
    under a temporary name, synced to disk, and renamed: a save that fails leaves what was there before.

    Args:
        model: a :class:`GPT` or a transformers model, without adapters; its ``tokenizer`` attribute is saved with it.
        path: the file or folder; one that holds a saved model is replaced.

    Raises:
        LLMBuilderError: adapters are attached, the folder holds files that are no part of a model, or the model is
            neither native nor a transformers model.
    """
    path = Path(path)
    _refuse_adapters(model)
    if not isinstance(model, GPT) and not hasattr(model, "save_pretrained"):
        raise LLMBuilderError(f"save_model: {type(model).__name__} is neither a GPT nor a transformers model")
    if path.suffix == ".pt":
        _save_file(model, path)
    else:
        _save_folder(model, path)


def _save_file(model: nn.Module, path: Path) -> None:
    if not isinstance(model, GPT):
        raise LLMBuilderError(f"save_model: {path}: only a native GPT fits in a .pt file; give a folder's name")
    if path.is_dir():
        raise LLMBuilderError(f"save_model: {path} is a folder; give another name")
    with replacing(path) as temporary:
        torch.save(_checkpoint(model), temporary)


def _save_folder(model: Any, path: Path) -> None:
    _refuse_foreign_files(path)
    with replacing(path) as temporary:
        temporary.mkdir()
        if isinstance(model, GPT):
            config = {"model_type": MODEL_TYPE, **_config(model)}
            (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_file(_weights(model), temporary / "model.safetensors", metadata={"format": "pt"})
        else:
            model.save_pretrained(temporary)
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; when the block ends well, sync what was written and rename it.

    Works for a file and for a folder. When the block raises, nothing is left behind and ``path`` is as it was. A folder
    with something in it can't be replaced in one step, so one that is in the way moves aside (``.NAME.….old``) for the
    moment of the renaming; a process killed in that moment leaves it whole beside the new one (``.NAME.….new``).
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:8]
    temporary, aside = path.with_name(f".{path.name}.{token}.new"), path.with_name(f".{path.name}.{token}.old")
    try:
        yield temporary
        for written in [*temporary.rglob("*"), temporary]:
            _sync(written)
        if path.is_dir():
            path.rename(aside)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        if aside.exists() and not path.exists():  # an error or Ctrl-C came between
            aside.rename(path)
        for leftover in (temporary, aside):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_adapters(model: nn.Module) -> None:
    adapted = next((name for name, _ in model.named_parameters() if "lora_" in name), None)
    if adapted is not None:
        raise LLMBuilderError(
            f"save_model: the model has adapters ({adapted}); merge them first (merge_lora) "
            "or save the adapter alone (save_adapter)"
        )


def _refuse_foreign_files(path: Path) -> None:
    """Replacing a folder deletes it: never one that holds anything but a saved model."""
    if path.is_dir():
        for entry in sorted(path.iterdir()):
            if not any(entry.match(own) for own in _OWN_FILES + _OWN_TOKENIZER_FILES):
                raise LLMBuilderError(
                    f"save_model: {path} holds {entry.name}, which is no part of a saved model; give another folder"
                )
    elif path.exists():
        raise LLMBuilderError(f"save_model: {path} is a file; give a folder's name, or one that ends in .pt")


def _config(model: GPT) -> dict[str, Any]:
    """The config, with the tie as it is: merging an adapter may have untied the head since."""
    tied = model.head.weight is model.embedding.weight
    return dataclasses.replace(model.config, tie_word_embeddings=tied).to_dict()


def _weights(model: GPT) -> dict[str, Tensor]:
    """The weights by name, each stored once."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if model.head.weight is model.embedding.weight:
        del weights["head.weight"]
    return weights


def _checkpoint(model: GPT) -> dict[str, Any]:
    """What a .pt file holds: tensors, numbers and strings only, so that it loads without running anything."""
    files = {}
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            files = {file.name: file.read_text(encoding="utf-8") for file in sorted(Path(folder).iterdir())}
    return {"model_type": MODEL_TYPE, "config": _config(model), "tokenizer": files, "weights": _weights(model)}
