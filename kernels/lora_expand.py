"""y = scaling S Bᵀ + b in Triton, written only; or added to a y that is there."""

# mypy: disable-error-code=no-untyped-def
import triton
import triton.language as tl
from torch import Tensor
from triton import Config

from .launch import launch, precision, size_class, tuned
from .mask import keep_tile
from .tiles import inner, load_tile, padded, per_thread, store_tile


@triton.jit
def update_tile(
    S, B, M, N, r, S_step, B_step, B_next, scaling, seed, stream, threshold, rows, first_column,
    DROP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """keep ∘ (scaling S Bᵀ) in fp32, for these rows and the columns from the first on."""
    columns = first_column + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, RANK, STEP):
        ranks = first + tl.arange(0, STEP)
        left = load_tile(S, S_step, rows, ranks, M, r)
        at = B + columns[None, :].to(tl.int64) * B_step + ranks[:, None].to(tl.int64) * B_next
        right = tl.load(at, (columns < N)[None, :] & (ranks < r)[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    total *= scaling
    if DROP:
        keep = keep_tile(tl.load(seed), rows, first_column, stream, threshold, ROWS, COLUMNS)
        total = tl.where(keep, total, 0.0)
    return total


@tuned(
    [
        Config({"ROWS": 64, "COLUMNS": 64}, num_warps=4, num_stages=2),
        Config({"ROWS": 64, "COLUMNS": 128}, num_warps=4, num_stages=2),
        Config({"ROWS": 128, "COLUMNS": 128}, num_warps=8, num_stages=2),
        Config({"ROWS": 32, "COLUMNS": 256}, num_warps=8, num_stages=2),
    ],
    key=["N", "r", "rows_class", "ACCUMULATE", "DROP", "PRECISION"],
    fits=lambda tile: per_thread(tile, tile["ROWS"] * tile["COLUMNS"]) <= (32 if tile["PRECISION"] == "ieee" else 64),
    restore=["y"],
)
@triton.jit(do_not_specialize=["stream", "threshold", "rows_class"])
def expand_kernel(
    y, S, B, bias, M, N, r, y_step, S_step, B_step, B_next, scaling, seed, stream, threshold, rows_class,
    ACCUMULATE: tl.constexpr, DROP: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    RANK: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of y a program; programs go along a row of tiles first."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(N, COLUMNS)
    rows = program // tiles * ROWS + tl.arange(0, ROWS)
    first = program % tiles * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    total = update_tile(
        S, B, M, N, r, S_step, B_step, B_next, scaling, seed, stream, threshold, rows, first,
        DROP, ROWS, COLUMNS, RANK, STEP, PRECISION,
    )  # fmt: skip
    if BIAS:
        total += tl.load(bias + columns, columns < N, other=0.0).to(tl.float32)[None, :]
    if ACCUMULATE:
        total += load_tile(y, y_step, rows, columns, M, N).to(tl.float32)
    store_tile(y, y_step, rows, columns, M, N, total)


def lora_expand(S: Tensor, B: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """y[M, N] = scaling · S[M, r] B[N, r]ᵀ + bias[N]."""
    y = S.new_empty(S.shape[0], B.shape[0])
    expand(y, S, B, bias, scaling)
    return y


def lora_expand_(y: Tensor, S: Tensor, B: Tensor, scaling: float) -> None:
    """y[M, N] += scaling · S[M, r] B[N, r]ᵀ, in place."""
    expand(y, S, B, None, scaling, accumulate=True)


def expand(
    y: Tensor, S: Tensor, B: Tensor, bias: Tensor | None, scaling: float, accumulate: bool = False,
    threshold: int = 0, seed: Tensor | None = None, stream: int = 0,
) -> None:  # fmt: skip
    """y = keep ∘ (scaling · S Bᵀ) + bias, or y += the same; B with any two strides."""
    (M, N), r = y.shape, B.shape[1]
    launch(
        expand_kernel,
        lambda tile: triton.cdiv(M, tile["ROWS"]) * triton.cdiv(N, tile["COLUMNS"]),
        y,
        *(y, S, B, bias, M, N, r, y.stride(0), S.stride(0), *B.stride(), scaling),
        *(seed, stream, threshold, size_class(M)),
        ACCUMULATE=accumulate,
        DROP=threshold > 0,
        BIAS=bias is not None,
        RANK=padded(r),
        STEP=min(padded(r), inner(r, y.dtype)),
        PRECISION=precision(y.dtype),
    )
