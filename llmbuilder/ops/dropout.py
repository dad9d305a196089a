"""Dropout with a counter-based mask: nothing but the seed is kept for the backward pass.

    y = x * keep / (1 - p),   keep = dropout_mask(x.shape, p, seed, stream)

Source: Srivastava et al. 2014 (JMLR 15); Philox4x32-7: Salmon et al. 2011 (SC '11).
"""

from typing import Any

import torch
from torch import Tensor

from . import _backend


def dropout(x: Tensor, p: float, seed: Tensor | None = None, stream: int = 0) -> Tensor:
    """Zero each element with probability ``p`` and scale the others by ``1/(1-p)``.

    Args:
        x: any shape, strides and floating dtype.
        p: probability of zero, in [0, 1); rounded to a multiple of 1/65536, and so is the scale.
        seed: int64 scalar tensor on x's device; drawn from torch's generator of that device when None (in a compiled
            graph, independent calls may draw theirs in another order than they are written in).
        stream: which of 2**32 independent masks of this seed.

    Returns:
        Tensor like ``x``, contiguous; ``x`` itself when p rounds to 0. What is dropped is 0 even where x is not finite.
        The same seed, stream and shape give the same bits on every backend and with any number of threads.
        Differentiable any number of times.

    Raises:
        ValueError: ``p`` outside [0, 1) or rounding to 1, x not floating point, or an unfit seed or stream.
    """
    check_floating("dropout", x=x)
    threshold = quantise("dropout", p)
    if threshold == 0:
        return x
    check_mask("dropout", x, seed, stream)
    return apply_mask(x, threshold, seed_like(x.detach()) if seed is None else seed, stream)


def dropout_mask(shape: torch.Size | tuple[int, ...], p: float, seed: Tensor, stream: int = 0) -> Tensor:
    """The mask that ``dropout`` and ``lora_linear`` use: True where an element of a tensor of this shape is kept.

    Args:
        shape: of x. A row of the mask is one of the last dimension; rows are counted over all others.
        p, seed, stream: as for ``dropout``.

    Returns:
        Boolean tensor on the seed's device. ``dropout(x, p, seed, stream)`` is ``where(mask, x, 0) * scale``, scale
        being ``65536 / (65536 - floor(65536 * p + 0.5))``.

    Raises:
        ValueError: as for ``dropout``.
    """
    threshold = quantise("dropout_mask", p)
    ones = torch.ones(shape, dtype=torch.bfloat16, device=getattr(seed, "device", None))
    check_mask("dropout_mask", ones, seed, stream)
    return apply_mask(ones, threshold, seed, stream) != 0


def quantise(operator: str, p: float) -> int:
    """p in units of 1/65536, the threshold below which a 16-bit slice drops its element."""
    threshold = int(65536 * p + 0.5) if 0 <= p < 1 else 65536
    if threshold == 65536:
        raise ValueError(f"{operator}: p must lie in [0, 1) and not round to 1 in units of 1/65536, got {p}")
    return threshold


def check_floating(operator: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{operator}: {name} must be floating point, got {tensor.dtype}; convert it first")


def check_mask(operator: str, x: Tensor, seed: Tensor | None, stream: int) -> None:
    """The seed's form, and that stream, rows and columns fit the mask's 32-bit counters."""
    if seed is not None:
        is_tensor = isinstance(seed, Tensor)
        if not is_tensor or seed.dtype != torch.int64 or seed.dim() != 0 or seed.device != x.device:
            got = f"{seed.dtype} of shape {list(seed.shape)} on {seed.device}" if is_tensor else f"{seed!r}"
            raise ValueError(
                f"{operator}: seed must be an int64 scalar tensor on {x.device}, as torch.tensor(7) is, got {got}"
            )
    if not 0 <= stream < 2**32:
        raise ValueError(f"{operator}: stream must lie in [0, 2**32), got {stream}")
    columns = x.shape[-1] if x.dim() else 1
    if columns and (columns > 2**35 or x.numel() // columns > 2**32):
        raise ValueError(f"{operator}: at most 2**32 rows of 2**35 columns have a mask, got shape {list(x.shape)}")


@torch.library.custom_op("llmbuilder::seed_like", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def seed_like(x: Tensor) -> Tensor:
    """A fresh int64 scalar from the generator of x's device: repeated by manual_seed and by recomputation."""
    return torch.randint(2**62, (), dtype=torch.int64, device=x.device)


@seed_like.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.int64)


@torch.library.custom_op("llmbuilder::apply_mask", mutates_args=())
def apply_mask(x: Tensor, threshold: int, seed: Tensor, stream: int) -> Tensor:
    """x * keep * 65536/(65536 - threshold); its own gradient formula, with the same mask."""
    return _backend.serve("dropout", x)(x.contiguous(), threshold, seed, stream)


@apply_mask.register_fake
def _(x: Tensor, threshold: int, seed: Tensor, stream: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.threshold, seed, ctx.stream = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (seed,) = ctx.saved_tensors
    return apply_mask(grad, ctx.threshold, seed, ctx.stream), None, None, None


apply_mask.register_autograd(_backward, setup_context=_setup_context)
