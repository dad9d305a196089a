"""Tiles of matrices whose columns lie side by side and whose rows are `step` apart. Beyond the edge they are zero."""

# mypy: disable-error-code=no-untyped-def
import torch
import triton
import triton.language as tl


@triton.jit
def load_tile(matrix, step, rows, columns, M, N):
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    return tl.load(matrix + rows.to(tl.int64)[:, None] * step + columns[None, :], inside, other=0.0)


@triton.jit
def store_tile(matrix, step, rows, columns, M, N, value):
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    at = matrix + rows.to(tl.int64)[:, None] * step + columns[None, :]
    tl.store(at, value.to(matrix.dtype.element_ty), inside)


def padded(rank: int) -> int:
    """The rank as tiles have it: a power of two, and no less than the tensor cores' 16. Memory is not padded."""
    return max(16, triton.next_power_of_2(rank))


def inner(rank: int, dtype: torch.dtype) -> int:
    """Columns of x and A that a product takes in at a time: few where the rank is large, for shared memory."""
    return 64 if padded(rank) * dtype.itemsize <= 256 else 32
