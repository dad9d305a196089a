"""A frozen linear layer with a low-rank update, and its gradients, without a mask or a dropped copy in memory.

    y = x Wᵀ + b + scaling · drop(x) Aᵀ Bᵀ

Kept for the backward pass: x (autograd shares it with whoever else keeps it), S = drop(x) Aᵀ [M, r], and the seed.
Source: Hu et al. 2021 (arXiv 2106.09685), equation 3.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _backend, _gemm, _paths
from .dropout import check_floating, check_mask, quantise, seed_like

# Rows up to which inference takes three plain products: at one or a few tokens a step, launches are all the cost.
_FEW_ROWS = 8


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """``linear(x, weight, bias) + scaling * dropout(x, p, seed, stream) @ lora_A.T @ lora_B.T``.

    Args:
        x: [..., K], any leading dimensions and strides; M is their product.
        weight: [N, K] of x's dtype, any strides. Usually frozen; where it or the bias requires grad it gets one.
        bias: [N] or None.
        lora_A: [r, K]; lora_B: [N, r]. Their dtypes may differ from x's (fp32 masters beside bf16 x): the products
            use them in x's dtype, and their gradients come back in their own.
        scaling: the factor of the update, alpha/r in LoRA.
        p, seed, stream: dropout of the update's input, as for ``dropout``.

    Returns:
        [..., N] in x's dtype. Sums are fp32 (fp64 for fp64), and the same call gives the same bits. With lora_B = 0 it
        equals the frozen layer within one rounding. Under autocast x, weight and bias are cast as `F.linear` does.
        Differentiable once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or as for ``dropout``; the text names the argument.
    """
    x, weight, bias = _autocast(x, weight, bias)
    _check("lora_linear", x, lora_A, lora_B)
    _check_base("lora_linear", x, weight, bias)
    if weight.shape[0] != lora_B.shape[0]:
        raise ValueError(
            f"lora_linear: weight has {weight.shape[0]} rows but lora_B {lora_B.shape[0]}: both must be the output size"
        )
    return _apply("lora_linear", x, weight, bias, lora_A, lora_B, scaling, p, seed, stream)


def lora_delta(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """The update alone, ``scaling * dropout(x, p, seed, stream) @ lora_A.T @ lora_B.T``, to add to any base layer.

    Arguments, result and errors are those of ``lora_linear``.
    """
    (x,) = _autocast(x)
    _check("lora_delta", x, lora_A, lora_B)
    return _apply("lora_delta", x, None, None, lora_A, lora_B, scaling, p, seed, stream)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear(x, weight, bias)`` by the fastest path for a weight that does not train.

    Args:
        x: [..., K]; weight: [N, K] of x's dtype, any strides; bias: [N] or None.

    Returns:
        [..., N] in x's dtype (under autocast, in autocast's). Only x gets a gradient; where weight or bias requires
        one, this is `F.linear`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    x, weight, bias = _autocast(x, weight, bias)
    check_floating("frozen_linear", x=x)
    _check_base("frozen_linear", x, weight, bias)
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return F.linear(x, weight, bias)
    return _frozen_linear(x, weight, bias)


def _apply(
    operator: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    p: float,
    seed: Tensor | None,
    stream: int,
) -> Tensor:
    threshold = quantise(operator, p)
    if threshold == 0:
        seed = None
        if not torch.is_grad_enabled() and x.numel() <= _FEW_ROWS * x.shape[-1]:
            update = F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) * scaling
            return update if weight is None else F.linear(x, weight, bias) + update
    else:
        check_mask(operator, x, seed, stream)
        seed = seed_like(x.detach()) if seed is None else seed
    y, _ = _lora_linear(x, weight, bias, A, B, scaling, threshold, seed, stream)
    return y


def _autocast(x: Tensor, *others: Tensor | None) -> list[Any]:
    """All in autocast's dtype where that is on, as `F.linear` would have them (fp64 stays, and so do its partners)."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return [x, *others]
    dtype = torch.get_autocast_dtype(kind)
    return [t if t is None else t.to(dtype) for t in (x, *others)]


def _check(operator: str, x: Tensor, A: Tensor, B: Tensor) -> None:
    check_floating(operator, x=x, lora_A=A, lora_B=B)
    if x.dim() == 0 or A.dim() != 2 or B.dim() != 2 or A.shape[1] != x.shape[-1] or B.shape[1] != A.shape[0]:
        raise ValueError(
            f"{operator}: expected x [..., K], lora_A [r, K] and lora_B [N, r], "
            f"got {list(x.shape)}, {list(A.shape)} and {list(B.shape)}"
        )
    for name, tensor in (("lora_A", A), ("lora_B", B)):
        if tensor.device != x.device:
            raise ValueError(f"{operator}: {name} is on {tensor.device}, x on {x.device}; move one of them")


def _check_base(operator: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{operator}: expected x [..., K] and weight [N, K], got {list(x.shape)}, {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{operator}: bias must be [{weight.shape[0]}] as weight has rows, got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(
                f"{operator}: {name} is {tensor.dtype} on {tensor.device}, x is {x.dtype} on {x.device}; "
                "cast or move one of them, or use torch.autocast"
            )


@torch.library.custom_op("llmbuilder::lora_linear", mutates_args=())
def _lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    threshold: int,
    seed: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """y and S = drop(x) Aᵀ; weight None stands for a base that is zero. seed None goes with threshold 0."""
    rows = _rows(x)
    with _own_dtypes(x):
        S = _backend.serve("lora_shrink", x)(rows, _beside(A, x), threshold, _seed(seed, x), stream)
        forward = _update_first if _backend.update_first(x) else _base_first
        y = forward(rows, weight, bias, S, _beside(B, x), scaling)
    return _shaped(y, x), S


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """y [M, N] with the leading dimensions of x, as a result of its own: in a view of one that a custom operator
    returns nothing may be changed in place, and models add to what a layer returns."""
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[1]])


def _base_first(x: Tensor, weight: Tensor | None, bias: Tensor | None, S: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y = base, then y += update: the order of a library that cannot add a product to what is there."""
    y = x.new_zeros(x.shape[0], B.shape[0]) if weight is None else _gemm.linear(x, weight, bias)
    _backend.serve("lora_expand_", x)(y, S, B, scaling)
    return y


def _update_first(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, S: Tensor, B: Tensor, scaling: float
) -> Tensor:
    """y = update + bias, then y += base in the library's product; or all in one kernel where that is faster."""
    bias = None if bias is None else bias.contiguous()
    if weight is not None and _paths.fused(x, weight, B.shape[1]):
        return _backend.serve("lora_fused", x)(x, weight, bias, S, B, scaling)
    y = _backend.serve("lora_expand", x)(S, B, bias, scaling)
    return y if weight is None else y.addmm_(x, weight.t())


@_lora_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    threshold: int,
    seed: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor]:
    *lead, _ = x.shape
    return x.new_empty(*lead, B.shape[0]), x.new_empty(torch.Size(lead).numel(), A.shape[0])


@torch.library.custom_op("llmbuilder::lora_linear_backward", mutates_args=())
def _lora_linear_backward(
    dY: Tensor,
    x: Tensor,
    weight: Tensor | None,
    S: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    threshold: int,
    seed: Tensor | None,
    stream: int,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dX (empty unless needed), dA, dB."""
    rows, dy = _rows(x), _rows(dY)
    with _own_dtypes(x):
        dS, dB = _backend.serve("lora_grad_sb", x)(dy, S, _beside(B, x), scaling)
        backward = _update_first_backward if _backend.update_first(x) else _base_first_backward
        dA, dX = backward(rows, dy, weight, dS, _beside(A, x), (threshold, _seed(seed, x), stream), need_x)
    return x.new_empty(0) if dX is None else dX.view(x.shape), dA.to(A.dtype), dB.to(B.dtype)


def _base_first_backward(
    x: Tensor, dY: Tensor, weight: Tensor | None, dS: Tensor, A: Tensor, mask: tuple[int, Tensor, int], need_x: bool
) -> tuple[Tensor, Tensor | None]:
    """dA and, where x needs it, dX: the base's first, the update's added by the kernel that has drawn the mask."""
    dX = None
    if need_x:
        dX = torch.zeros_like(x) if weight is None else _gemm.linear_grad(dY, weight)
    return _backend.serve("lora_grad_ax_", x)(x, dS, A, *mask, dX), dX


def _update_first_backward(
    x: Tensor, dY: Tensor, weight: Tensor | None, dS: Tensor, A: Tensor, mask: tuple[int, Tensor, int], need_x: bool
) -> tuple[Tensor, Tensor | None]:
    """dA and, where x needs it, dX: the update's first, the base's added by the library's product; or all in one."""
    if need_x and weight is not None and _paths.fused(dY, weight.t(), len(A)):
        dA, _ = _backend.serve("lora_grad_ax", x)(x, dS, A, *mask, False)
        return dA, _backend.serve("lora_fused_grad", x)(dY, weight, dS, A, *mask)
    dA, dX = _backend.serve("lora_grad_ax", x)(x, dS, A, *mask, need_x)
    if dX is not None and weight is not None:
        dX.addmm_(dY, weight)
    return dA, dX


@_lora_linear_backward.register_fake
def _(
    dY: Tensor,
    x: Tensor,
    weight: Tensor | None,
    S: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    threshold: int,
    seed: Tensor | None,
    stream: int,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else 0),
        torch.empty(A.shape, dtype=A.dtype, device=A.device),
        torch.empty(B.shape, dtype=B.dtype, device=B.device),
    )


def _setup_lora(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, A, B, ctx.scaling, ctx.threshold, seed, ctx.stream = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1], A, B, seed)


def _backward_lora(ctx: Any, dY: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, S, A, B, seed = ctx.saved_tensors
    need_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
    dX, dA, dB = _lora_linear_backward(dY, x, weight, S, A, B, ctx.scaling, ctx.threshold, seed, ctx.stream, need_x)
    return (
        dX if need_x else None,
        _rows(dY).t() @ _rows(x) if need_weight else None,
        _rows(dY).sum(0) if need_bias else None,
        dA if need_A else None,
        dB if need_B else None,
        *(None,) * 4,
    )


_lora_linear.register_autograd(_backward_lora, setup_context=_setup_lora)


@torch.library.custom_op("llmbuilder::frozen_linear", mutates_args=())
def _frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with _own_dtypes(x):
        return _shaped(_gemm.linear(_rows(x), weight, bias), x)


@_frozen_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup_frozen(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward_frozen(ctx: Any, dY: Tensor) -> tuple[Tensor, None, None]:
    (weight,) = ctx.saved_tensors
    return _frozen_linear(dY, weight.t(), None), None, None


_frozen_linear.register_autograd(_backward_frozen, setup_context=_setup_frozen)


def _rows(x: Tensor) -> Tensor:
    """x as a matrix that its backend takes: one behind the other's rows on a CPU, rows with any step on a GPU."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if _backend.update_first(x) and _steps_by_rows(rows) else rows.contiguous()


def _steps_by_rows(matrix: Tensor) -> bool:
    """Columns side by side, and rows that do not overlap (an expanded row would)."""
    rows, columns = matrix.shape
    return (columns <= 1 or matrix.stride(1) == 1) and (rows <= 1 or matrix.stride(0) >= columns)


def _own_dtypes(x: Tensor) -> torch.autocast:
    """What autocast had to cast is cast by now: here, and in a backward pass under autocast, it must cast no more."""
    return torch.autocast(x.device.type, enabled=False)


def _beside(adapter: Tensor, x: Tensor) -> Tensor:
    return adapter.to(x.dtype).contiguous()


def _seed(seed: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.int64) if seed is None else seed  # which nobody reads without dropout
