"""Tiles of matrices whose columns lie side by side and whose rows are `step` apart. Beyond the edge they are zero."""

# mypy: disable-error-code=no-untyped-def
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import precision


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
    """How much of a product's inner dimension is taken in at a time.

    Products by FMA hold all of it in registers, tensor cores take it from shared memory, where the rank adds to it.
    """
    if precision(dtype) == "ieee":
        return 16
    return 64 if padded(rank) * dtype.itemsize <= 256 else 32


def per_thread(tile: dict[str, Any], elements: int) -> int:
    """Elements of a program that each of its threads holds."""
    return elements // (32 * tile["num_warps"])
