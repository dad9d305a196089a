"""What loading a GGUF file through transformers needs beside the call itself."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFReader
from torch import nn
from transformers import GgufConfig

from ..errors import LLMBuilderError
from .structure import head

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def stored_dtype(path: Path) -> torch.dtype | None:
    """The dtype that most of the weights are stored in, or None when any matrix is quantised.

    Raises:
        LLMBuilderError: the file is truncated, corrupt or no GGUF.
    """
    try:
        kinds = [(tensor.tensor_type, len(tensor.shape), int(tensor.n_elements)) for tensor in GGUFReader(path).tensors]
    except Exception as error:  # the reader trips over a damaged file in many ways: numpy, struct, enums, unicode
        raise LLMBuilderError(
            f"{path} is truncated or corrupt, or no GGUF file ({type(error).__name__}: {error}); download it again"
        ) from error
    sizes: Counter[torch.dtype] = Counter()
    for kind, _, elements in kinds:
        if kind not in _PLAIN:
            return None
        sizes[_PLAIN[kind]] += elements
    return sizes.most_common(1)[0][0] if sizes else None


def options(name: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained``: that file, all unpacked, even where kernels could compute on packed weights."""
    return {"gguf_file": name, "quantization_config": GgufConfig(dequantize=True)}


def unmark(model: Any, path: Path) -> None:
    """Take the marks of a quantised model away: they stay on an unpacked one, and forbid training and saving.

    Raises:
        LLMBuilderError: a layer is still packed.
    """
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    packed = [name for name, parameter in model.named_parameters() if not parameter.is_floating_point()]
    if packed or not isinstance(head(model), nn.Linear):
        raise LLMBuilderError(
            f"{path}: transformers left weights packed ({(packed or ['the head'])[0]}), so they can't be trained; "
            "convert the model to safetensors first"
        )
