"""Softmax and cross-entropy of a chunk of logits in Triton, and in the logits' place their gradient."""

# mypy: disable-error-code=no-untyped-def
import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

LARGEST_BLOCK = 4096  # columns at a time
LOWEST = tl.constexpr(-3.4028235e38)  # finite, so that columns of -inf count nothing instead of making NaN


@triton.jit
def capped(logits, softcap, SOFTCAP: tl.constexpr):
    """z = softcap · tanh(logits / softcap) and dz/dlogits; without a cap the logits and 1."""
    z = logits.to(tl.float32)
    slope = tl.full(z.shape, 1.0, tl.float32)
    if SOFTCAP:
        t = tl.abs(z) / softcap
        # tanh t = (1 - u) / (1 + u), slope 4u / (1 + u)². The first cancels where t is small: a series there; the other
        # is rounded oftener than 1 - tanh², which in turn cancels where t is large.
        u = tl.exp(-2.0 * t)
        small, square = t < 0.25, t * t
        series = square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
        tanh = tl.where(small, t + t * series, (1.0 - u) / (1.0 + u))
        z = tl.where(z < 0, -softcap * tanh, softcap * tanh)
        slope = tl.where(small, 1.0 - tanh * tanh, 4.0 * u / ((1.0 + u) * (1.0 + u)))
    return z, slope


@triton.jit
def cross_entropy_kernel(
    logits, targets, row_weights, losses, predictions, V, step, softcap,
    SOFTCAP: tl.constexpr, WEIGHTED: tl.constexpr, NEED_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row a program, in two sweeps: the largest z and Σ e^(z - largest), then the gradient.

    The sum leaves out the target, so that 1 - p of the target, its gradient, is a quotient and no difference.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * step
    target = tl.load(targets + row)
    target_z, _slope = capped(tl.load(logits + target), softcap, SOFTCAP)
    lanes = tl.arange(0, BLOCK)
    largest, others = tl.full((), LOWEST, tl.float32), tl.full((), 0.0, tl.float32)
    best = tl.full((), 0, tl.int64)
    for first in range(0, V, BLOCK):
        columns = first + lanes
        z, slope = capped(tl.load(logits + columns, columns < V, other=-float("inf")), softcap, SOFTCAP)
        top, place = tl.max(tl.where(z == z, z, -float("inf")), 0, return_indices=True)
        best = tl.where(top > largest, first + place, best)
        before, largest = largest, tl.maximum(largest, top)
        shares = tl.where((columns < V) & (columns != target), tl.exp(z - largest), 0.0)
        others = others * tl.exp(before - largest) + tl.sum(shares, 0)
    total = others + tl.exp(target_z - largest)
    tl.store(losses + row, tl.log(total) + (largest - target_z))
    tl.store(predictions + row, best)
    if NEED_GRAD:
        weight = tl.load(row_weights + row) if WEIGHTED else 1.0
        for first in range(0, V, BLOCK):
            columns = first + lanes
            z, slope = capped(tl.load(logits + columns, columns < V, other=0.0), softcap, SOFTCAP)
            share = tl.where(columns == target, -others, tl.exp(z - largest)) / total
            gradient = weight * share * slope
            tl.store(logits + columns, gradient.to(logits.dtype.element_ty), columns < V)


def softmax_cross_entropy_(
    logits: Tensor, targets: Tensor, row_weights: Tensor | None, softcap: float, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Losses and predictions of ``logits[M, V]``; their gradient takes the logits' place when asked for."""
    rows, V = logits.shape
    losses, predictions = (logits.new_empty(rows, dtype=dtype) for dtype in (torch.float32, torch.int64))
    launch(
        cross_entropy_kernel,
        rows,
        logits,
        *(logits, targets, row_weights, losses, predictions, V, logits.stride(0), softcap),
        SOFTCAP=softcap != 0,
        WEIGHTED=row_weights is not None,
        NEED_GRAD=need_grad,
        BLOCK=min(triton.next_power_of_2(V), LARGEST_BLOCK),
        num_warps=8,
    )
    return losses, predictions
