"""Where `lora_fused`, base and update in one kernel, serves: where it was measured to beat the library's product.

A row is a measurement on the GPU it names; `make bench-gpu` writes them. No row, no `lora_fused`.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Measured(NamedTuple):
    """`lora_fused` was faster on this GPU from so many rows of x on, for the product of x [rows, K] by a W [N, K].

    `lora_fused_grad` is such a product with N and K exchanged, and has a row of its own.
    """

    device: str  # as torch.cuda.get_device_name() has it
    dtype: torch.dtype
    N: int
    K: int
    rank: int
    rows: int


FUSED: tuple[Measured, ...] = ()


def fused(x: Tensor, weight: Tensor, rank: int) -> bool:
    """Whether `lora_fused` serves this layer on x's GPU."""
    if not FUSED or x.device.type != "cuda":
        return False
    layer = (torch.cuda.get_device_name(x.device), x.dtype, *weight.shape, rank)
    return any(layer == row[:5] and x.shape[0] >= row.rows for row in FUSED)


def where() -> str:
    """For which layers `lora_fused` serves, in words."""
    layers = [f"{row.device}: {row.N} x {row.K}, rank {row.rank}, from {row.rows} rows on" for row in FUSED]
    return "; ".join(layers) or "no layer: it has been measured on no GPU yet"
