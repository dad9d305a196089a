"""y = scaling S Bᵀ + b in Triton, written only; or added to a y that is there."""

# mypy: disable-error-code=no-untyped-def
import triton
import triton.language as tl
from torch import Tensor
from triton import Config

from .launch import launch, precision, size_class, tuned
from .tiles import load_tile, padded, store_tile

RANK_STEP = 64  # of the rank, that a product takes in at a time


@tuned(
    [
        Config({"ROWS": 64, "COLUMNS": 64}, num_warps=4, num_stages=2),
        Config({"ROWS": 64, "COLUMNS": 128}, num_warps=4, num_stages=2),
        Config({"ROWS": 128, "COLUMNS": 128}, num_warps=8, num_stages=2),
        Config({"ROWS": 32, "COLUMNS": 256}, num_warps=8, num_stages=2),
    ],
    key=["N", "r", "rows_class", "ACCUMULATE"],
    restore=["y"],
)
@triton.jit(do_not_specialize=["rows_class"])
def expand_kernel(
    y, S, B, bias, M, N, r, y_step, S_step, B_step, scaling, rows_class,
    ACCUMULATE: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of y a program; programs go along a row of tiles first."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(N, COLUMNS)
    rows = program // tiles * ROWS + tl.arange(0, ROWS)
    columns = program % tiles * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, RANK, STEP):
        ranks = first + tl.arange(0, STEP)
        left = load_tile(S, S_step, rows, ranks, M, r)
        right = load_tile(B, B_step, columns, ranks, N, r)
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    total *= scaling
    if BIAS:
        total += tl.load(bias + columns, columns < N, other=0.0).to(tl.float32)[None, :]
    if ACCUMULATE:
        total += load_tile(y, y_step, rows, columns, M, N).to(tl.float32)
    store_tile(y, y_step, rows, columns, M, N, total)


def lora_expand(S: Tensor, B: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """y[M, N] = scaling · S[M, r] B[N, r]ᵀ + bias[N]."""
    y = S.new_empty(S.shape[0], B.shape[0])
    _expand(y, S, B, bias, scaling, accumulate=False)
    return y


def lora_expand_(y: Tensor, S: Tensor, B: Tensor, scaling: float) -> None:
    """y[M, N] += scaling · S[M, r] B[N, r]ᵀ, in place."""
    _expand(y, S, B, None, scaling, accumulate=True)


def _expand(y: Tensor, S: Tensor, B: Tensor, bias: Tensor | None, scaling: float, accumulate: bool) -> None:
    (M, N), r = y.shape, B.shape[1]
    launch(
        expand_kernel,
        lambda chosen: triton.cdiv(M, chosen["ROWS"]) * triton.cdiv(N, chosen["COLUMNS"]),
        y,
        *(y, S, B, y if bias is None else bias, M, N, r, y.stride(0), S.stride(0), B.stride(0), scaling),
        size_class(M),
        ACCUMULATE=accumulate,
        BIAS=bias is not None,
        RANK=padded(r),
        STEP=min(padded(r), RANK_STEP),
        PRECISION=precision(y.dtype),
    )
