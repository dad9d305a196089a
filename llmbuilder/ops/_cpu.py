"""The backend `cpu`: the compiled kernels, and torch's products where the rank is so large that those are faster.

A kernel's skinny product reads x or y once, which counts while the rank is small; from rank 64 on arithmetic counts,
and a library's product with a dropped copy in memory wins.
"""

from torch import Tensor

from . import _gemm, _native
from ._native import dropout, ewc_accumulate_, ewc_penalty_, softmax_cross_entropy_

__all__ = [
    "dropout",
    "ewc_accumulate_",
    "ewc_penalty_",
    "lora_expand_",
    "lora_grad_ax_",
    "lora_grad_sb",
    "lora_shrink",
    "softmax_cross_entropy_",
]

_LARGE_RANK = 64


def lora_shrink(x: Tensor, A: Tensor, threshold: int, seed: Tensor, stream: int) -> Tensor:
    """S = drop(x) Aᵀ."""
    if len(A) < _LARGE_RANK:
        return _native.lora_shrink(x, A, threshold, seed, stream)
    return _gemm.linear(_dropped(x, threshold, seed, stream), A)


def lora_expand_(y: Tensor, S: Tensor, B: Tensor, scaling: float) -> None:
    """y += scaling · S Bᵀ."""
    if B.shape[1] < _LARGE_RANK:
        _native.lora_expand_(y, S, B, scaling)
    else:
        y.addmm_(S, B.t(), alpha=scaling)


def lora_grad_sb(dY: Tensor, S: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """dS = scaling · dY B and dB = scaling · dYᵀ S."""
    if B.shape[1] < _LARGE_RANK:
        return _native.lora_grad_sb(dY, S, B, scaling)
    return _gemm.linear_grad(dY, B).mul_(scaling), _gemm.linear(dY.t(), S.t()).float().mul_(scaling)


def lora_grad_ax_(
    x: Tensor, dS: Tensor, A: Tensor, threshold: int, seed: Tensor, stream: int, dX: Tensor | None
) -> Tensor:
    """dA = dSᵀ drop(x), and dX += drop'(dS A) unless it is None."""
    if len(A) < _LARGE_RANK:
        return _native.lora_grad_ax_(x, dS, A, threshold, seed, stream, dX)
    if dX is not None:
        dX.add_(_dropped(_gemm.linear_grad(dS, A), threshold, seed, stream))
    return _gemm.linear(dS.t(), _dropped(x, threshold, seed, stream).t()).float()


def _dropped(x: Tensor, threshold: int, seed: Tensor, stream: int) -> Tensor:
    return dropout(x, threshold, seed, stream) if threshold else x
