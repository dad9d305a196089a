"""Cross-entropy of a linear output layer by chunks of positions: the logits are never whole in memory.

    logits = softcap * tanh((x Wᵀ + b) / softcap)
    loss   = logsumexp(logits) - logits[target]

Gradients of a sum or a mean are computed in the forward sweep, while a chunk of logits is at hand; backward only
scales them. The gradient of single losses needs the incoming gradient first and sweeps once more.
Source: Wijmans et al. 2024 (arXiv 2411.09009), by chunks and with the library's products.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _backend, _gemm

# Logits in memory at once: enough rows for the products to run at full speed, little beside a model.
CHUNK_BYTES = 64 * 2**20
# Few enough for torch to add up their losses on one thread, whatever the number of threads.
MAX_CHUNK_ROWS = 8192
NO_GRADS = (False, False, False)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of ``softcap * tanh((x @ weight.T + bias) / softcap)`` against ``targets``, without whole logits.

    Equals ``F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction=..., ignore_index=...)``.
    Positions whose target is ``ignore_index`` cost nothing: their products are never computed.

    Args:
        x: [..., K], floating, any strides: what goes into the output layer.
        weight: [V, K] of x's dtype (under autocast both are cast, as ``F.linear`` does), any strides.
        targets: [...] int64, each in [0, V) or ``ignore_index``.
        bias: [V] of x's dtype.
        softcap: bounds the logits to ±softcap (Gemma 2, arXiv 2408.00118); None leaves them as they are.
        reduction: "mean" over the targets that count, "sum", or "none" for one loss a position (0 where ignored).
        ignore_index: the target that marks a position without one.
        row_weights: [...] float32 (float64 for float64 inputs), a constant factor of each position's loss; the mean is
            then over their sum. All of them 1 gives the bits of None.

    Returns:
        Scalar, or [...] for "none": float32, float64 for float64 inputs. As with torch, the mean over no target at
        all is NaN, with zero gradients.

    Products are in x's dtype; softmax, losses and the sums over chunks for weight and bias in float32 (float64 for
    float64). The kernel's results do not depend on the number of threads; the library's products follow the library.
    No gradient is computed for what needs none, and none at all under ``no_grad``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, an unknown reduction, a softcap that is not positive.
        IndexError: a target outside [0, V) that is not ``ignore_index``.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"linear_cross_entropy: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    rows, weight, labels, bias, cap = _prepare(x, weight, targets, bias, softcap)
    factors = None if row_weights is None else _factors(row_weights, rows, targets)
    if reduction == "none":
        losses = linear_cross_entropy_losses(rows, weight, labels, bias, cap, ignore_index)
        return (losses if factors is None else losses * factors).reshape(targets.shape)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (rows, weight, bias)]
    total = linear_cross_entropy_sum(rows, weight, labels, bias, cap, ignore_index, needs, factors)[0]
    if reduction == "sum":
        return total
    kept = labels != ignore_index
    count = kept.sum() if factors is None else (factors * kept).sum()
    return torch.where(count > 0, total / torch.where(count > 0, count, 1), torch.nan)


@torch.no_grad()
def score_tokens(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Each position's loss, as ``linear_cross_entropy(..., reduction="none")``, and its most likely token.

    Returns:
        losses [...] and predictions [...] int64 (the first index of the largest logit), without gradient; 0 and -1
        where the target is ``ignore_index``.

    Arguments, dtypes and errors are those of ``linear_cross_entropy``.
    """
    rows, weight, labels, bias, cap = _prepare(x, weight, targets, bias, softcap)
    result = _sweep(rows, weight, labels, bias, cap, ignore_index, NO_GRADS)
    return result.losses.reshape(targets.shape), result.predictions.reshape(targets.shape)


def chunk_rows(vocabulary: int, dtype: torch.dtype) -> int:
    """How many rows of logits are in memory at once: by shape alone, so that sums do not depend on threads."""
    return max(1, min(MAX_CHUNK_ROWS, CHUNK_BYTES // (max(1, vocabulary) * dtype.itemsize)))


def _prepare(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
    """Checked arguments as the operators want them: rows [M, K], weight, targets [M], bias, and 0 for no soft cap."""
    if not (x.ndim and weight.ndim == 2 and x.shape[-1] == weight.shape[1]):
        raise ValueError(
            f"linear_cross_entropy: x [..., K] and weight [V, K] must share K, got {[*x.shape]} and {[*weight.shape]}"
        )
    if targets.shape != x.shape[:-1] or targets.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: targets must be int64 of shape {[*x.shape[:-1]]}, "
            f"got {targets.dtype} of {[*targets.shape]}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_cross_entropy: bias must have shape {[weight.shape[0]]}, got {[*bias.shape]}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"linear_cross_entropy: softcap must be positive or None, got {softcap}")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if not x.is_floating_point() or any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        dtypes = [str(t.dtype) for t in (x, weight, bias) if t is not None]
        raise ValueError(f"linear_cross_entropy: x, weight and bias must share a floating dtype, got {dtypes}")
    if any(t is not None and t.device != x.device for t in (weight, targets, bias)):
        raise ValueError(f"linear_cross_entropy: all tensors must be on x's device, {x.device}")
    return x.reshape(targets.numel(), x.shape[-1]), weight, targets.reshape(-1), bias, float(softcap or 0.0)


def _factors(row_weights: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """Checked row weights as the operators want them."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if row_weights.shape != targets.shape or row_weights.dtype != dtype or row_weights.device != rows.device:
        raise ValueError(
            f"linear_cross_entropy: row_weights must be {dtype} of shape {[*targets.shape]} on {rows.device}, "
            f"got {row_weights.dtype} of {[*row_weights.shape]} on {row_weights.device}"
        )
    return row_weights.detach().reshape(-1)


class _Sweep(NamedTuple):
    total: Tensor
    losses: Tensor
    predictions: Tensor
    dx: Tensor
    dweight: Tensor
    dbias: Tensor


def _sweep(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float,
    ignore_index: int,
    needs: Sequence[bool],
    row_weights: Tensor | None = None,
) -> _Sweep:
    """Losses of all rows and gradients of Σ row_weight·loss, chunk by chunk over the rows that have a target.

    ``needs`` says which of dx, dweight and dbias are computed; the others come back empty.
    """
    rows = (targets != ignore_index).nonzero().squeeze(-1)
    _check_range(targets[rows], len(weight), ignore_index)
    sums = torch.promote_types(x.dtype, torch.float32)
    need_x, need_weight, need_bias = needs
    total = x.new_zeros((), dtype=torch.float64)
    losses, predictions = x.new_zeros(len(x), dtype=sums), torch.full_like(targets, -1)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    dweight = x.new_zeros(weight.shape, dtype=sums) if need_weight else x.new_empty(0)
    dbias = x.new_zeros(len(weight), dtype=sums) if need_bias else x.new_empty(0)
    softmax_cross_entropy_ = _backend.serve("softmax_cross_entropy_", x)
    with torch.autocast(x.device.type, enabled=False):
        for chunk in torch.split(rows, chunk_rows(len(weight), x.dtype)) if len(rows) else ():
            part = x[chunk]
            logits = _gemm.linear(part, weight, bias)
            chunk_weights = None if row_weights is None else row_weights[chunk]
            loss, best = softmax_cross_entropy_(logits, targets[chunk], chunk_weights, softcap, any(needs))
            total += (loss if chunk_weights is None else loss * chunk_weights).sum(dtype=torch.float64)
            losses[chunk], predictions[chunk] = loss, best
            if need_x:
                dx[chunk] = _gemm.linear_grad(logits, weight)
            if need_weight:
                dweight += _gemm.linear(logits.t(), part.t())
            if need_bias:
                dbias += logits.sum(0, dtype=sums)
            del logits  # before the next chunk's are made
    return _Sweep(total.to(sums), losses, predictions, dx, dweight.to(weight.dtype), dbias.to(x.dtype))


def _check_range(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    wrong = targets[(targets < 0) | (targets >= vocabulary)]
    if len(wrong):
        raise IndexError(
            f"linear_cross_entropy: target {int(wrong[0])} is outside the {vocabulary} rows of weight "
            f"(positions without a target are marked {ignore_index})"
        )


@torch.library.custom_op("llmbuilder::linear_cross_entropy_sum", mutates_args=())
def linear_cross_entropy_sum(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float,
    ignore_index: int,
    needs: list[bool],
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of the weighted losses, and its gradients by x, weight and bias where ``needs`` asks for them."""
    result = _sweep(x, weight, targets, bias, softcap, ignore_index, needs, row_weights)
    return result.total, result.dx, result.dweight, result.dbias


@linear_cross_entropy_sum.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float,
    ignore_index: int,
    needs: list[bool],
    row_weights: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32)), *_fake_grads(x, weight, needs)


def _sum_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[6]
    _, *grads = output
    ctx.mark_non_differentiable(*grads)
    ctx.save_for_backward(*grads)


def _sum_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias = (g * grad if need else None for g, need in zip(ctx.saved_tensors, ctx.needs, strict=True))
    return dx, dweight, None, dbias, None, None, None, None


linear_cross_entropy_sum.register_autograd(_sum_backward, setup_context=_sum_setup_context)


@torch.library.custom_op("llmbuilder::linear_cross_entropy_losses", mutates_args=())
def linear_cross_entropy_losses(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float, ignore_index: int
) -> Tensor:
    """One loss a row; 0 where ignored."""
    return _sweep(x, weight, targets, bias, softcap, ignore_index, NO_GRADS).losses


@linear_cross_entropy_losses.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float, ignore_index: int) -> Tensor:
    return x.new_empty(targets.shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _losses_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, targets, bias, ctx.softcap, ctx.ignore_index = inputs
    ctx.save_for_backward(x, weight, targets, bias)


def _losses_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, targets, bias = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    grads = linear_cross_entropy_grads(x, weight, targets, bias, ctx.softcap, ctx.ignore_index, needs, grad)
    dx, dweight, dbias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return dx, dweight, None, dbias, None, None


linear_cross_entropy_losses.register_autograd(_losses_backward, setup_context=_losses_setup_context)


@torch.library.custom_op("llmbuilder::linear_cross_entropy_grads", mutates_args=())
def linear_cross_entropy_grads(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float,
    ignore_index: int,
    needs: list[bool],
    row_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of Σ row_weight·loss by x, weight and bias where ``needs`` asks for them."""
    result = _sweep(x, weight, targets, bias, softcap, ignore_index, needs, row_weights)
    return result.dx, result.dweight, result.dbias


@linear_cross_entropy_grads.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float,
    ignore_index: int,
    needs: list[bool],
    row_weights: Tensor,
) -> tuple[Tensor, ...]:
    return _fake_grads(x, weight, needs)


def _fake_grads(x: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    shapes: tuple[Sequence[int], ...] = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))
