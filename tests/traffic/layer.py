"""Bytes that a LoRA layer's forward and backward pass move, in units of one pass over x or y (U).

Our kernels' are counted by the emulator: different bytes of each buffer that a launch read or wrote. The library's
products and eager operators are counted as in eager.py. N = K, 16-bit x and adapters; the weights are apart.
"""

from dataclasses import dataclass
from unittest.mock import patch

import torch
from gpusim.harness import Emulator
from torch import nn
from traffic.eager import EagerTraffic

from llmbuilder.ops import lora

M, N = 96, 256
U = 2 * M * N
SEED = 11


@dataclass(frozen=True)
class Moved:
    kernels: dict[str, float]  # by launch's kernel, in U
    products: float  # of the library or eager torch, in U
    small: int  # bytes of S, dS, A, B and their gradients, and partial sums

    @property
    def exposed(self) -> float:
        return sum(self.kernels.values())

    @property
    def total(self) -> float:
        return self.exposed + self.products


def ours(emulator: Emulator, rank: int, fused: bool = False, threshold: int = 6554) -> Moved:
    """The path of the library's products, or the one in which one kernel has base and update."""
    x, dY = torch.randn(M, N).bfloat16(), torch.randn(M, N).bfloat16()
    W, A, B = (torch.randn(*shape).bfloat16() for shape in ((N, N), (rank, N), (N, rank)))
    mask = threshold, torch.tensor(SEED), 0
    # the functions beneath torch's custom operators, in which a dispatch mode sees nothing
    forward, backward = lora._lora_linear._init_fn, lora._lora_linear_backward._init_fn
    products = EagerTraffic()
    with patch("llmbuilder.ops._paths.fused", lambda *_: fused), emulator.recording() as launches, products:
        _, S = forward(x, W, None, A, B, 2.0, *mask)
        backward(dY, x, W, S, A, B, 2.0, *mask, True)
    kernels: dict[str, float] = {}
    small = 0
    for launch in launches:
        name = launch.kernel
        for buffer, traffic in launch.traffic.items():
            moved = traffic.unique_read + traffic.unique_written
            if f"[{M}, {N}]" in buffer:
                kernels[name] = kernels.get(name, 0) + moved / U
            elif f"[{N}, {N}]" not in buffer:
                small += moved
    return Moved(kernels, products.moved[M, N] / U, small)


class _NativeDropout(nn.Module):
    """What nn.Dropout calls on a GPU."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(x, self.p, True)[0]


def peft(rank: int, p: float = 0.1) -> Moved:
    """PEFT's layer as it is, with the dropout that it has on a GPU."""
    import peft

    base = nn.Linear(N, N, bias=False).bfloat16().requires_grad_(False)
    config = peft.LoraConfig(r=rank, lora_dropout=p, target_modules=["0"])
    wrapped = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)
    layer = wrapped.base_model.model[0].train()
    if p:
        layer.lora_dropout["default"] = _NativeDropout(p)
    x, dY = torch.randn(M, N).bfloat16().requires_grad_(), torch.randn(M, N).bfloat16()
    with EagerTraffic() as moved:
        layer(x).backward(dY)
    small = sum(size for shape, size in moved.moved.items() if shape not in ((M, N), (N, N)))
    return Moved({}, moved.moved[M, N] / U, small)


def frozen() -> Moved:
    """The layer without LoRA."""
    W = torch.randn(N, N).bfloat16()
    x, dY = torch.randn(M, N).bfloat16().requires_grad_(), torch.randn(M, N).bfloat16()
    with EagerTraffic() as moved:
        nn.functional.linear(x, W).backward(dY)
    return Moved({}, moved.moved[M, N] / U, 0)
