"""Elastic weight consolidation: what it costs to move weights that earlier tasks depend on.

    penalty = strength/2 · Σ F (θ - θ*)²,   gradient = strength · F (θ - θ*)

θ are the weights, θ* where earlier tasks left them, F the diagonal of their Fisher information. F = 1 gives L2-SP.
Source: Kirkpatrick et al. 2017 (arXiv 1612.00796), equation 3; L2-SP: Li et al. 2018 (arXiv 1802.01483).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _backend
from .reference import widen


def ewc_penalty(
    params: Sequence[Tensor], anchors: Sequence[Tensor], fishers: Sequence[Tensor] | None, strength: float
) -> Tensor:
    """``strength/2 * sum((F * (p - a)**2).sum() for p, a, F in zip(params, anchors, fishers))``, differentiable.

    Inside a training loop ``ewc_penalty_`` does the same in one pass over the weights.

    Args:
        params: the weights θ, of any shapes and floating dtypes, all on one device.
        anchors: θ*, and fishers: F (None: ones), each like its param in shape and dtype.
        strength: factor of the whole penalty.

    Returns:
        Scalar, fp32 (fp64 where a param is fp64), summed in fp64; 0 for no params. Differentiable once, in the params.

    Raises:
        ValueError: lists of unequal length, or a tensor unlike its param; the text names both.
    """
    _check("ewc_penalty", params, anchors=anchors, **({} if fishers is None else {"fishers": fishers}))
    if not params:
        return torch.zeros((), dtype=torch.float32)
    return _ewc_penalty(list(params), list(anchors), list(fishers or ()), strength)


def ewc_penalty_(
    params: Sequence[Tensor], anchors: Sequence[Tensor], fishers: Sequence[Tensor] | None, strength: float
) -> Tensor:
    """Adds the penalty's gradient to each ``param.grad`` in place (a missing one starts at zero), in one pass.

    Args:
        params, anchors, fishers, strength: as for ``ewc_penalty``; all contiguous, and the gradients too.

    Returns:
        The penalty's value, an fp64 scalar on the params' device, which nothing here waits for. Differences and
        products are fp32 or better, the sum fp64 in an order fixed by the shapes: the same call gives the same bits.

    Raises:
        ValueError: as for ``ewc_penalty``, a tensor that is not contiguous, or one given twice. No gradient is touched
            then.
    """
    groups = {"anchors": anchors, **({} if fishers is None else {"fishers": fishers})}
    _check("ewc_penalty_", params, **groups)
    _check_contiguous("ewc_penalty_", params=params, **groups)
    _check_distinct("ewc_penalty_", params)
    _check_contiguous("ewc_penalty_", **{"the gradients of params": [p.grad for p in params if p.grad is not None]})
    for param in params:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
    total = torch.zeros((), dtype=torch.float64, device=params[0].device if params else None)
    for group in _by_dtype(params):
        chosen = None if fishers is None else [fishers[i] for i in group]
        serve = _backend.serve("ewc_penalty_", params[group[0]])
        total += serve([params[i] for i in group], [anchors[i] for i in group], chosen, strength)
    return total


def ewc_accumulate_(fishers: Sequence[Tensor], grads: Sequence[Tensor], weight: float = 1.0) -> None:
    """``F += weight * g**2`` in place: adds one example's squared gradient to the Fisher diagonal.

    Args:
        fishers: F, of any shapes, contiguous; grads: g, each like its F in shape, dtype and device.
        weight: factor of the square, for example one over the number of tokens.

    Raises:
        ValueError: lists of unequal length, a g unlike its F, or an F given twice. No F is touched then.
    """
    _check("ewc_accumulate_", fishers, grads=grads)
    _check_contiguous("ewc_accumulate_", fishers=fishers, grads=grads)
    _check_distinct("ewc_accumulate_", fishers)
    with torch.no_grad():
        for group in _by_dtype(fishers):
            serve = _backend.serve("ewc_accumulate_", fishers[group[0]])
            serve([fishers[i] for i in group], [grads[i] for i in group], weight)


def _by_dtype(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of tensors of one dtype each time, the dtypes in order of appearance; a backend serves one at a time."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        yield [i for i, t in enumerate(tensors) if t.dtype == dtype]


def _check(operator: str, firsts: Sequence[Tensor], **groups: Sequence[Tensor]) -> None:
    for name, group in groups.items():
        if len(group) != len(firsts):
            raise ValueError(f"{operator}: {name} must have {len(firsts)} tensors, as the first list, got {len(group)}")
    for i, first in enumerate(firsts):
        if not first.is_floating_point() or first.device != firsts[0].device:
            raise ValueError(
                f"{operator}: tensor {i} of the first list is {first.dtype} on {first.device}; "
                f"all must be floating point on {firsts[0].device}"
            )
        for name, group in groups.items():
            if _form(group[i]) != _form(first):
                raise ValueError(
                    f"{operator}: {name}[{i}] must be {_form(first)} as its partner, got {_form(group[i])}"
                )


def _form(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {list(tensor.shape)} on {tensor.device}"


def _check_distinct(operator: str, tensors: Sequence[Tensor]) -> None:
    """Kernels write the tensors of a call side by side: one that stands there twice would be a race."""
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        raise ValueError(f"{operator}: the same tensor stands twice in the first list; name each once")


def _check_contiguous(operator: str, **groups: Sequence[Tensor]) -> None:
    for name, group in groups.items():
        for tensor in group:
            if not tensor.is_contiguous():
                got = f"shape {list(tensor.shape)} with strides {list(tensor.stride())}"
                raise ValueError(f"{operator}: {name} must be contiguous, got {got}; call .contiguous() on it first")


@torch.library.custom_op("llmbuilder::ewc_penalty", mutates_args=())
def _ewc_penalty(params: list[Tensor], anchors: list[Tensor], fishers: list[Tensor], strength: float) -> Tensor:
    """The value; no fishers stand for ones."""
    total = torch.zeros((), dtype=torch.float64, device=params[0].device)
    for i, (param, anchor) in enumerate(zip(params, anchors, strict=True)):
        drift = widen(param) - anchor
        pull = drift * fishers[i] if fishers else drift
        total += (pull * drift).sum(dtype=torch.float64)
    return (strength / 2 * total).to(_value_dtype(params))


@_ewc_penalty.register_fake
def _(params: list[Tensor], anchors: list[Tensor], fishers: list[Tensor], strength: float) -> Tensor:
    return params[0].new_empty((), dtype=_value_dtype(params))


def _value_dtype(params: list[Tensor]) -> torch.dtype:
    return torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    params, anchors, fishers, ctx.strength = inputs
    ctx.count = len(params)
    ctx.save_for_backward(*params, *anchors, *fishers)


def _backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor], list[None], list[None], None]:
    saved, n = ctx.saved_tensors, ctx.count
    params, anchors, fishers = saved[:n], saved[n : 2 * n], saved[2 * n :]
    factor = grad * ctx.strength
    pulls = [factor * (widen(param) - anchor) for param, anchor in zip(params, anchors, strict=True)]
    if fishers:
        pulls = [pull * fisher for pull, fisher in zip(pulls, fishers, strict=True)]
    grads = [pull.to(param.dtype) for pull, param in zip(pulls, params, strict=True)]
    return grads, [None] * n, [None] * len(fishers), None


_ewc_penalty.register_autograd(_backward, setup_context=_setup_context)
