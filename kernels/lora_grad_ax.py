"""dA = dSᵀ drop(x) and dX = drop'(dS A) in Triton: x is read once and the mask drawn once for both."""

# mypy: disable-error-code=no-untyped-def
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import Config

from . import mask
from .launch import launch, precision, size_class, tuned
from .lora_expand import expand
from .mask import keep_tile
from .sums import sum_parts
from .tiles import load_tile, padded, per_thread, store_tile

# Above, A's tile leaves no registers for a combined pass: dX gets a launch of its own, x is still read but once.
ONE_PASS_RANK = 32


def _fits(tile: dict[str, Any]) -> bool:
    """Products by FMA hold ROWS, dA's inner dimension, in registers beside the sums."""
    sums = per_thread(tile, tile["RANK"] * tile["COLUMNS"])
    return tile["ROWS"] <= 16 and sums <= 32 if tile["PRECISION"] == "ieee" else sums <= 64


@tuned(
    [
        Config({"ROWS": 16, "COLUMNS": 64}, num_warps=4, num_stages=3),
        Config({"ROWS": 32, "COLUMNS": 64}, num_warps=4, num_stages=3),
        Config({"ROWS": 32, "COLUMNS": 64}, num_warps=8, num_stages=3),
        Config({"ROWS": 64, "COLUMNS": 128}, num_warps=8, num_stages=2),
        Config({"ROWS": 16, "COLUMNS": 64}, num_warps=8, num_stages=3),
        Config({"ROWS": 16, "COLUMNS": 32}, num_warps=8, num_stages=2),
    ],
    key=["K", "r", "rows_class", "DROP", "NEED_X", "PRECISION"],
    fits=_fits,
)
@triton.jit(do_not_specialize=["stream", "threshold", "rows_class"])
def grad_ax_kernel(
    x, dS, A, parts, dX, M, K, r, x_step, dS_step, A_step, dA_step, dA_next, seed, stream, threshold, scale, part_rows,
    rows_class, DROP: tl.constexpr, NEED_X: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of x and part_rows of its rows a program. Programs go along the columns first."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(K, COLUMNS)
    part, first = program // blocks, program % blocks * COLUMNS
    columns, ranks = first + tl.arange(0, COLUMNS), tl.arange(0, RANK)
    total = tl.zeros((RANK, COLUMNS), tl.float32)
    if DROP:
        key = tl.load(seed)
    if NEED_X:
        factor = load_tile(A, A_step, ranks, columns, r, K)
    for start in range(part * part_rows, tl.minimum((part + 1) * part_rows, M), ROWS):
        rows = start + tl.arange(0, ROWS)
        value = load_tile(x, x_step, rows, columns, M, K)
        slope = load_tile(dS, dS_step, rows, ranks, M, r)
        if DROP:
            keep = keep_tile(key, rows, first, stream, threshold, ROWS, COLUMNS)
            value = tl.where(keep, value, 0.0)
        total = tl.dot(tl.trans(slope), value, total, input_precision=PRECISION)
        if NEED_X:
            update = tl.dot(slope, factor, input_precision=PRECISION) * scale
            if DROP:
                update = tl.where(keep, update, 0.0)
            store_tile(dX, K, rows, columns, M, K, update)
    at = parts + part * r * K + ranks.to(tl.int64)[:, None] * dA_step + columns[None, :] * dA_next
    tl.store(at, total * scale, (ranks < r)[:, None] & (columns < K)[None, :])


def lora_grad_ax(
    x: Tensor, dS: Tensor, A: Tensor, threshold: int, seed: Tensor, stream: int, need_x: bool
) -> tuple[Tensor, Tensor | None]:
    """dA[r, K] = dSᵀ drop(x) in fp32, and dX[M, K] = drop'(dS A) in x's dtype where it is needed, else None."""
    dA = A.new_empty(A.shape, dtype=torch.float32)
    dX = x.new_empty(x.shape) if need_x else None
    scale, combined = mask.scale(threshold), A.shape[0] <= ONE_PASS_RANK
    grad_ax(x, dS, A, dA, dA.stride(), dX if combined else None, scale, threshold, seed, stream)
    if dX is not None and not combined:
        expand(dX, dS, A.t(), None, scale, False, threshold, seed, stream)
    return dA, dX


def grad_ax(
    x: Tensor, dS: Tensor, A: Tensor | None, dA: Tensor, dA_steps: tuple[int, ...], dX: Tensor | None,
    scale: float, threshold: int = 0, seed: Tensor | None = None, stream: int = 0,
) -> None:  # fmt: skip
    """dA = scale · dSᵀ (keep ∘ x), its [rank, column] lying at these steps; dX = scale · keep ∘ (dS A) unless None."""
    (M, K), r = x.shape, dS.shape[1]
    rows = part_rows(r)
    parts = dA.new_empty(triton.cdiv(M, rows), *dA.shape)
    launch(
        grad_ax_kernel,
        lambda tile: triton.cdiv(K, tile["COLUMNS"]) * len(parts),
        x,
        *(x, dS, A, parts, dX, M, K, r, x.stride(0), dS.stride(0), 0 if A is None else A.stride(0), *dA_steps),
        *(seed, stream, threshold, scale, rows, size_class(M)),
        DROP=threshold > 0,
        NEED_X=dX is not None,
        RANK=padded(r),
        PRECISION=precision(x.dtype),
    )
    sum_parts(parts, dA)


def part_rows(rank: int) -> int:
    """Rows whose sum one program makes: so many that partial sums are an eighth of the reading and writing of x, dX."""
    return 16 * padded(rank)
