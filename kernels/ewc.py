"""Elastic weight consolidation in Triton, over all tensors in one launch by way of a table of addresses on the device.

One thousand tensors are cut into chunks that never straddle two; a row of the table is a chunk, a program too.
"""

# mypy: disable-error-code=no-untyped-def
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._gpu import Addresses, Sizes, Tables
from .launch import launch

CHUNK, BLOCK = 8192, 1024  # elements of a program, and of one step of it
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def address(row, column: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer in a column of a row of the table."""
    pointer = tl.load(row + column).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_fp32(pointers, inside):
    """Zero outside; `inside` None stands for everywhere, which alone lets whole vectors be read."""
    value = tl.load(pointers) if inside is None else tl.load(pointers, inside, other=0.0)
    return value.to(tl.float32)


@triton.jit
def penalty_step(theta, anchor, fisher, grad, at, inside, strength, WEIGHTED: tl.constexpr):
    """Adds the gradient, and returns F (θ - θ*)² in fp64, the dtype of its sum."""
    drift = load_fp32(theta + at, inside) - load_fp32(anchor + at, inside)
    pull = drift
    if WEIGHTED:
        pull *= load_fp32(fisher + at, inside)
    slope = load_fp32(grad + at, inside) + strength * pull
    tl.store(grad + at, slope.to(grad.dtype.element_ty), inside)
    return (pull * drift).to(tl.float64)


@triton.jit
def penalty_kernel(
    table, values, strength, TYPE: tl.constexpr, WEIGHTED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """A chunk a program: whole blocks without a mask, in vector accesses, then the tail."""
    program = tl.program_id(0).to(tl.int64)
    row = table + program * 5
    theta, anchor = address(row, 1, TYPE, ALIGNED), address(row, 2, TYPE, ALIGNED)
    fisher, grad = address(row, 3, TYPE, ALIGNED), address(row, 4, TYPE, ALIGNED)
    size = tl.load(row)
    whole = size // BLOCK * BLOCK
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, whole, BLOCK):
        at = tl.multiple_of(first, BLOCK) + lanes
        total += penalty_step(theta, anchor, fisher, grad, at, None, strength, WEIGHTED)
    at = whole + lanes
    total += penalty_step(theta, anchor, fisher, grad, at, at < size, strength, WEIGHTED)
    tl.store(values + program, tl.sum(total))


@triton.jit
def value_kernel(values, result, count, factor, BLOCK: tl.constexpr):
    """The sum of the chunks' values in order, times the factor."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, count, BLOCK):
        total += tl.load(values + first + lanes, first + lanes < count, other=0.0)
    tl.store(result, tl.sum(total) * factor)


@triton.jit
def accumulate_step(fisher, grad, at, inside, weight):
    slope = load_fp32(grad + at, inside)
    total = load_fp32(fisher + at, inside) + weight * slope * slope
    tl.store(fisher + at, total.to(fisher.dtype.element_ty), inside)


@triton.jit
def accumulate_kernel(table, weight, TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    row = table + tl.program_id(0).to(tl.int64) * 3
    fisher, grad = address(row, 1, TYPE, ALIGNED), address(row, 2, TYPE, ALIGNED)
    size = tl.load(row)
    whole = size // BLOCK * BLOCK
    lanes = tl.arange(0, BLOCK)
    for first in range(0, whole, BLOCK):
        accumulate_step(fisher, grad, tl.multiple_of(first, BLOCK) + lanes, None, weight)
    at = whole + lanes
    accumulate_step(fisher, grad, at, at < size, weight)


def ewc_penalty_(
    params: Sequence[Tensor], anchors: Sequence[Tensor], fishers: Sequence[Tensor] | None, strength: float
) -> Tensor:
    """Adds strength · F(θ - θ*) to each ``.grad``; strength/2 Σ F(θ - θ*)² as an fp64 scalar on the device."""
    result = params[0].new_empty((), dtype=torch.float64)
    grads = [param.grad for param in params if param.grad is not None]
    table, aligned = _tables.of(params, anchors, anchors if fishers is None else fishers, grads)
    values = result.new_empty(len(table))
    meta = {"TYPE": TYPES[params[0].dtype], "ALIGNED": aligned, "WEIGHTED": fishers is not None, "BLOCK": BLOCK}
    launch(penalty_kernel, len(table), result, table, values, strength, **meta)
    launch(value_kernel, 1, result, values, result, len(table), strength / 2, BLOCK=BLOCK)
    return result


def ewc_accumulate_(fishers: Sequence[Tensor], grads: Sequence[Tensor], weight: float) -> None:
    """F += weight · g² in place."""
    if not fishers:
        return
    table, aligned = _tables.of(fishers, grads)
    meta = {"TYPE": TYPES[fishers[0].dtype], "ALIGNED": aligned, "BLOCK": BLOCK}
    launch(accumulate_kernel, len(table), fishers[0], table, weight, **meta)


def _written_table(first: Tensor, sizes: Sizes, addresses: Addresses) -> tuple[Tensor, bool]:
    """A row a chunk, of its size and its address in each group; and whether all addresses are multiples of 16."""
    with torch.device("cpu"):
        size = torch.tensor(sizes)
        counts = (size + CHUNK - 1) // CHUNK
        tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
        begin = (torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]) * CHUNK
        starts = [torch.tensor(group)[tensor] + begin * first.element_size() for group in addresses]
        table = torch.stack([(size[tensor] - begin).clamp(max=CHUNK), *starts], 1)
    return table.to(first.device), bool((table[:, 1:] % 16 == 0).all())


_tables = Tables(_written_table)
