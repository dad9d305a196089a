"""The frozen base product, by the fastest library path at hand.

In fp32 oneDNN's AVX-512 path can be twice as fast as torch's default. The operator that reaches it is private to
torch, so one probe looks whether it is there and as precise as `F.linear`; where it is not, `F.linear` serves. No
process-wide setting is changed. The choice depends on dtype, device and shape alone: equal calls give equal bits.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

# Multiplications below which handing a product to oneDNN costs more than it saves (10 to 15 µs a call).
_WORTHWHILE = 2**19


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b for x [M, K] and W [N, K] of any strides, W of x's dtype."""
    if _worthwhile(x, weight):
        return _onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_grad(dY: Tensor, weight: Tensor) -> Tensor:
    """dY W, the gradient with respect to x of ``linear``."""
    return linear(dY, weight.t())


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _worthwhile(x: Tensor, weight: Tensor) -> bool:
    size = x.shape[0] * weight.shape[0] * weight.shape[1]
    return x.dtype == torch.float32 and x.device.type == "cpu" and size >= _WORTHWHILE and onednn_is_precise()


@functools.cache
def onednn_is_precise() -> bool:
    """True when oneDNN's fp32 product is there and truly fp32: processors with AMX could multiply in bf16 instead.

    Its error against fp64 may be four times that of ``F.linear`` (about twice is normal; bf16 gives thousands).
    """
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(rows, 512, generator=generator, dtype=torch.float32) for rows in (96, 80))
    exact = x.double() @ weight.double().t()
    try:
        product = _onednn(x, weight, None)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False

    def error(y: Tensor) -> float:
        return float((y.double() - exact).abs().max())

    return product.shape == exact.shape and error(product) <= 4 * error(F.linear(x, weight))
