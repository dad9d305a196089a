"""One way to load a model, whatever it is stored as."""

import json
import os
import pickle
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ..errors import ConfigError, LLMBuilderError, nearest
from . import gguf
from .gpt import GPT, GPTConfig
from .pickles import load_tensors, refusal
from .save import MODEL_TYPE
from .tokenizer import byte_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    """
    wanted = _parse_dtype(dtype)
    device = torch.device(device)
    model = _read(path, wanted, device)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return model.to(device=device).eval()


def computes_bf16(device: str | torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware (AVX512-BF16 or AMX; on GPUs from Ampere on)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The torch dtype, or None for "auto"."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of auto, {', '.join(DTYPES)}, got '{dtype}'{nearest(dtype, DTYPES)}")
    return DTYPES.get(dtype)


def _read(path: str | os.PathLike[str], dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    folder = Path(path).expanduser()
    if folder.is_file():
        if folder.suffix == ".pt":
            return _native_file(folder, dtype)
        if folder.suffix == ".gguf":
            return _gguf(folder, dtype, device)
        raise LLMBuilderError(f"{folder} is no model file that is known (.pt, .gguf); give the folder that holds it")
    if folder.is_dir():
        if (folder / "config.json").is_file():
            if _read_json(folder / "config.json").get("model_type") == MODEL_TYPE:
                return _native_folder(folder, dtype)
            return _hugging_face(folder, dtype)
        if (folder / "model.pt").is_file():
            return _native_file(folder / "model.pt", dtype)
        files = sorted(folder.glob("*.gguf"))
        if len(files) == 1:
            return _gguf(files[0], dtype, device)
        raise LLMBuilderError(_no_model(folder, files))
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(path)):
        return _hugging_face(str(path), dtype)
    raise LLMBuilderError(f"there is no file or folder {folder}")


def _no_model(folder: Path, gguf_files: list[Path]) -> str:
    """Why a folder isn't a model, and what to give instead."""
    if gguf_files:
        return f"{folder} holds several GGUF files; give one of them: {', '.join(file.name for file in gguf_files)}"
    if (folder / "adapter_config.json").is_file():
        base = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        return (
            f"{folder} holds an adapter, not a model; load its base model ({base or 'not named there'}) "
            "and put the adapter on it with load_adapter, or on the command line: --model BASE --adapter FOLDER"
        )
    inside = [f"{folder / name}" for name in ("model", "adapter") if (folder / name).is_dir()]
    hint = f"; did you mean {' or '.join(inside)}?" if inside else ""
    return f"{folder} holds no model: no config.json, model.pt or .gguf file{hint}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LLMBuilderError(f"cannot read {path}: {error}; the model has to be saved or downloaded again") from error
    if not isinstance(content, dict):
        raise LLMBuilderError(f"{path} holds no JSON object; the model has to be saved or downloaded again")
    return content


# --- native ---


def _native_file(path: Path, dtype: torch.dtype | None) -> GPT:
    content = load_tensors(path)
    if not isinstance(content, dict) or content.get("model_type") != MODEL_TYPE:
        raise LLMBuilderError(f"{path} is a torch file, but no checkpoint of an llmbuilder GPT (see save_model)")
    model = _native(path, content["config"], content["weights"], dtype)
    if content["tokenizer"]:
        with tempfile.TemporaryDirectory() as folder:
            for name, text in content["tokenizer"].items():
                (Path(folder) / Path(name).name).write_text(text, encoding="utf-8")
            model.tokenizer = _native_tokenizer(Path(folder))
    return model


def _native_folder(folder: Path, dtype: torch.dtype | None) -> GPT:
    config = _read_json(folder / "config.json")
    del config["model_type"]
    weights = folder / "model.safetensors"
    try:
        tensors = load_file(weights)
    except Exception as error:  # safetensors has an error class of its own, hidden from the public API
        raise LLMBuilderError(f"{weights} is missing, truncated or corrupt ({error}); save the model again") from error
    model = _native(folder, config, tensors, dtype)
    if (folder / "tokenizer.json").is_file():
        model.tokenizer = _native_tokenizer(folder)
    return model


def _native(source: Path, config: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype | None) -> GPT:
    """A GPT of that shape around those tensors, with the byte-level tokenizer where it fits."""
    try:
        with torch.device("meta"):  # no memory and no time for weights that are replaced at once
            model = GPT(GPTConfig(**config))
        tied = model.config.tie_word_embeddings
        if tied:
            weights = {**weights, "head.weight": weights["embedding.weight"]}
        model.load_state_dict(weights, assign=True)
    except (TypeError, KeyError, RuntimeError, ConfigError) as error:
        raise LLMBuilderError(f"{source}: config and weights don't fit together: {error}") from error
    if tied:
        model.head.weight = model.embedding.weight
    model.tokenizer = byte_tokenizer() if model.config.vocab_size >= len(byte_tokenizer()) else None
    return model.to(dtype) if dtype is not None else model


def _native_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # tokenizers raises plain Exception
        raise LLMBuilderError(f"{folder}: its tokenizer is corrupt ({error}); save the model again") from error


# --- transformers ---


def _hugging_face(source: Path | str, dtype: torch.dtype | None, gguf_file: str | None = None) -> nn.Module:
    """A transformers model and its tokenizer from a folder, a hub id, or a GGUF file in a folder."""
    where = str(Path(source) / gguf_file) if gguf_file else str(source)
    tokenizer = _tokenizer(source, where, gguf_file)
    options = gguf.options(gguf_file) if gguf_file else {}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype or "auto", trust_remote_code=False, output_loading_info=True, **options
        )
    except pickle.UnpicklingError as error:
        files = sorted(Path(source).glob("*.bin")) or [Path(source)]
        raise refusal(files[0], error) from error
    except Exception as error:  # transformers lets through whatever safetensors, json, gguf, its config ... raise
        raise LLMBuilderError(_unreadable(where, "model", error)) from error
    for kind in ("missing_keys", "mismatched_keys"):
        if report[kind]:
            raise LLMBuilderError(
                f"{where} is incomplete or of another shape than its config says: {len(report[kind])} "
                f"{kind.replace('_keys', '')} weights, such as {sorted(map(str, report[kind]))[0]}; download it again"
            )
    model.tokenizer = tokenizer
    return model


def _tokenizer(source: Path | str, where: str, gguf_file: str | None) -> PreTrainedTokenizerFast:
    options = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True, trust_remote_code=False, **options)
    except Exception as error:  # as above
        raise LLMBuilderError(_unreadable(where, "tokenizer", error)) from error
    if not tokenizer.is_fast:
        raise LLMBuilderError(f"{where}: its tokenizer has no fast version (tokenizer.json); convert it first")
    if tokenizer.pad_token is None:
        # Padding is masked by length, never by this id, so that the end of text is still learnt.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _unreadable(where: str, part: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if Path(where).exists():
        return f"cannot load the {part} in {where}: {reason}"
    return (
        f"cannot load {where}: it is no file or folder here, and it could not be had from the Hugging Face hub "
        f"({reason}); check the name, or download the model first"
    )


def _gguf(path: Path, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    if dtype is None:
        dtype = gguf.stored_dtype(path) or (torch.bfloat16 if computes_bf16(device) else torch.float32)
    model = _hugging_face(path.parent, dtype, path.name)
    gguf.unmark(model, path)
    return model
