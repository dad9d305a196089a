"""Reading what ``save_model`` wrote of a native model."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..errors import ConfigError, LLMBuilderError
from .gpt import GPT, GPTConfig
from .pickles import load_tensors
from .save import MODEL_TYPE
from .tokenizer import byte_tokenizer


def from_file(path: Path, dtype: torch.dtype | None) -> GPT:
    """The model in a ``.pt`` file.

    Raises:
        LLMBuilderError: it holds something else, asks to run something, or is truncated or corrupt.
    """
    content = load_tensors(path)
    parts = {"config", "weights", "tokenizer"}
    if not isinstance(content, dict) or content.get("model_type") != MODEL_TYPE or not parts <= set(content):
        raise LLMBuilderError(f"{path} is a torch file, but no checkpoint of an llmbuilder GPT (see save_model)")
    model = _build(path, content["config"], content["weights"], dtype)
    if content["tokenizer"]:
        with tempfile.TemporaryDirectory() as folder:
            for name, text in content["tokenizer"].items():
                (Path(folder) / Path(name).name).write_text(text, encoding="utf-8")
            model.tokenizer = _tokenizer(Path(folder), path)
    return model


def from_folder(folder: Path, config: dict[str, Any], dtype: torch.dtype | None) -> GPT:
    """The model in a folder whose ``config.json`` holds ``config``.

    Raises:
        LLMBuilderError: a file is missing, truncated or corrupt, or they don't fit together.
    """
    weights = folder / "model.safetensors"
    try:
        tensors = load_file(weights)
    except Exception as error:  # safetensors has an error class of its own, hidden from the public API
        raise LLMBuilderError(f"{weights} is missing, truncated or corrupt ({error}); save the model again") from error
    shape = {name: value for name, value in config.items() if name != "model_type"}
    model = _build(folder, shape, tensors, dtype)
    if (folder / "tokenizer.json").is_file():
        model.tokenizer = _tokenizer(folder, folder)
    return model


def _build(source: Path, config: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype | None) -> GPT:
    """A GPT of that shape around those tensors, with the byte-level tokenizer where it fits."""
    try:
        with torch.device("meta"):  # no memory and no time for weights that are replaced at once
            model = GPT(GPTConfig(**config))
        tied = model.config.tie_word_embeddings
        if tied:
            weights = {**weights, "head.weight": weights["embedding.weight"]}
        model.load_state_dict(weights, assign=True)
    except (TypeError, KeyError, AttributeError, RuntimeError, ConfigError) as error:
        raise LLMBuilderError(f"{source}: config and weights don't fit together: {error}") from error
    if tied:
        model.head.weight = model.embedding.weight
    default = byte_tokenizer()
    model.tokenizer = default if len(default) <= model.config.vocab_size else None
    return model.to(dtype) if dtype is not None else model


def _tokenizer(folder: Path, source: Path) -> PreTrainedTokenizerFast:
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # tokenizers raises plain Exception
        raise LLMBuilderError(f"{source}: its tokenizer is corrupt ({error}); save the model again") from error
