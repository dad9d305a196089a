"""GGUF files: read by transformers, and made an ordinary model that trains and saves."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFReader
from torch import nn

from ..errors import LLMBuilderError
from .dtypes import computes_bf16
from .hugging_face import from_pretrained
from .structure import head

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def from_gguf(path: Path, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    """The model in a GGUF file, unpacked.

    Args:
        path: the file.
        dtype: of the weights; None: as stored, and where that is quantised, bf16 if ``device`` computes it, else fp32.
        device: where the model will run.

    Raises:
        LLMBuilderError: the file is truncated, corrupt, no GGUF, or of an architecture that transformers can't unpack.
    """
    if dtype is None:
        dtype = stored_dtype(path) or (torch.bfloat16 if computes_bf16(device) else torch.float32)
    model = from_pretrained(path.parent, dtype, gguf_file=path.name)
    _unmark(model, path)
    return model


def stored_dtype(path: Path) -> torch.dtype | None:
    """The dtype that most of the weights are stored in, or None when any is quantised.

    Raises:
        LLMBuilderError: the file is truncated, corrupt or no GGUF.
    """
    sizes: Counter[torch.dtype] = Counter()
    try:
        for tensor in GGUFReader(path).tensors:
            if tensor.tensor_type not in _PLAIN:
                return None
            sizes[_PLAIN[tensor.tensor_type]] += int(tensor.n_elements)
    except Exception as error:  # the reader trips over a damaged file in many ways: numpy, struct, enums, unicode
        raise LLMBuilderError(
            f"{path} is truncated or corrupt, or no GGUF file ({type(error).__name__}: {error}); download it again"
        ) from error
    return sizes.most_common(1)[0][0] if sizes else None


def _unmark(model: Any, path: Path) -> None:
    """Take the marks of a quantised model away: they stay on an unpacked one, and forbid training and saving."""
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
