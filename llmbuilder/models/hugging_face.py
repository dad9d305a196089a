"""Loading through transformers, with its failures turned into one clear error each."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast

from ..errors import LLMBuilderError
from .pickles import refusal


def from_pretrained(source: Path | str, dtype: torch.dtype | None, gguf_file: str | None = None) -> nn.Module:
    """A transformers model and its tokenizer from a folder, a hub id, or a GGUF file in a folder.

    Raises:
        LLMBuilderError: transformers can't read it, weights are missing, it is quantised or an adapter, or its code
            would have to be run.
    """
    where = str(Path(source) / gguf_file) if gguf_file else str(source)
    tokenizer = _tokenizer(source, where, gguf_file)
    if gguf_file:  # all unpacked, even where kernels could compute on packed weights
        options: dict[str, Any] = {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    else:
        options = {"config": _config(source, where)}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype or "auto", trust_remote_code=False, output_loading_info=True, **options
        )
    except pickle.UnpicklingError as error:
        files = sorted(Path(source).glob("*.bin")) or [Path(source)]
        raise refusal(files[0], error) from error
    except Exception as error:  # transformers lets through whatever safetensors, json, gguf, its config ... raise
        raise LLMBuilderError(_unreadable(where, "model", error)) from error
    _refuse_incomplete(where, report)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise LLMBuilderError(f"{where} is an adapter, not a model; load its base model and put the adapter on it")
    model.tokenizer = tokenizer
    return model


def _config(source: Path | str, where: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # as above
        raise LLMBuilderError(_unreadable(where, "model", error)) from error
    if getattr(config, "quantization_config", None) is not None:
        raise LLMBuilderError(f"{where} holds quantised weights: quantised bases can't be loaded yet; use a full one")
    return config


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


def _refuse_incomplete(where: str, report: dict[str, Any]) -> None:
    """transformers fills what is missing with noise and a warning; a model so made is worth nothing."""
    for kind in ("missing", "mismatched"):
        names = sorted(map(str, report[f"{kind}_keys"]))
        if names:
            raise LLMBuilderError(
                f"{where} is incomplete or of another shape than its config says: {len(names)} {kind} weights, "
                f"such as {names[0]}; download it again"
            )


def _unreadable(where: str, part: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if Path(where).exists():
        return f"cannot load the {part} in {where}: {reason}"
    return (
        f"cannot load {where}: it is no file or folder here, and it could not be had from the Hugging Face hub "
        f"({reason}); check the name, or download the model first"
    )
