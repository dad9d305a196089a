"""The second launch of a reduction: partial results added up in order."""

# mypy: disable-error-code=no-untyped-def
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

BLOCK = 1024


@triton.jit
def sum_block(parts, out, count, size, block, BLOCK: tl.constexpr):
    at = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(count):
        total += tl.load(parts + tl.cast(part, tl.int64) * size + at, at < size, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), at < size)


@triton.jit
def sum_parts_kernel(
    parts, out, count, size, other_parts, other_out, other_count, other_size, BLOCK: tl.constexpr
):  # fmt: skip
    """Programs of the first sum, then those of the other."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(size, BLOCK)
    if program < blocks:
        sum_block(parts, out, count, size, program, BLOCK)
    else:
        sum_block(other_parts, other_out, other_count, other_size, program - blocks, BLOCK)


def sum_parts(parts: Tensor, out: Tensor, other_parts: Tensor | None = None, other_out: Tensor | None = None) -> None:
    """out = parts.sum(0), and the other likewise in the same launch. parts: [count, *out.shape], fp32, contiguous."""
    size, other_size = out.numel(), 0 if other_out is None else other_out.numel()
    if other_parts is None or other_out is None:
        other_parts, other_out = parts, out
    launch(
        sum_parts_kernel,
        triton.cdiv(size, BLOCK) + triton.cdiv(other_size, BLOCK),
        out,
        *(parts, out, len(parts), size, other_parts, other_out, len(other_parts), other_size),
        BLOCK=BLOCK,
    )
