"""Which dtype weights are to have."""

import torch

from ..errors import ConfigError, nearest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The torch dtype that is meant by "fp32", "bf16", "fp16" or itself; None for "auto".

    Raises:
        ConfigError: another name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of auto, {', '.join(DTYPES)}, got '{dtype}'{nearest(dtype, DTYPES)}")
    return DTYPES.get(dtype)


def computes_bf16(device: str | torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware (AVX512-BF16 or AMX; on NVIDIA GPUs from Ampere on)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
