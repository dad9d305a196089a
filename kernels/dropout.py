"""Dropout in Triton, with the mask of kernels/mask.py."""

# mypy: disable-error-code=no-untyped-def
import torch
import triton
import triton.language as tl

from . import mask
from .launch import launch
from .mask import keep_tile

ROWS, COLUMNS = 4, 512  # of a tile: 16 elements a thread, of which a Philox call serves 8


@triton.jit(do_not_specialize=["stream", "threshold"])
def dropout_kernel(x, y, M, K, seed, stream, threshold, scale, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One tile a program; programs go along a row of tiles first."""
    program = tl.program_id(0).to(tl.int64)
    rows = program // tiles * ROWS + tl.arange(0, ROWS)
    first = program % tiles * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    at = rows[:, None] * K + columns[None, :]
    keep = keep_tile(tl.load(seed), rows, first, stream, threshold, ROWS, COLUMNS)
    value = tl.load(x + at, inside, other=0.0).to(tl.float32) * scale
    tl.store(y + at, tl.where(keep, value, 0.0).to(y.dtype.element_ty), inside)


def dropout(x: torch.Tensor, threshold: int, seed: torch.Tensor, stream: int) -> torch.Tensor:
    """x * keep * 65536/(65536 - threshold) for a contiguous x of fp32, bf16 or fp16."""
    y = torch.empty_like(x)
    if not x.numel():
        return y
    K = x.shape[-1] if x.dim() else 1
    M, tiles = x.numel() // K, triton.cdiv(K, COLUMNS)
    arguments = (x, y, M, K, seed, stream, threshold, mask.scale(threshold), tiles)
    launch(dropout_kernel, triton.cdiv(M, ROWS) * tiles, x, *arguments, ROWS=ROWS, COLUMNS=COLUMNS)
    return y
