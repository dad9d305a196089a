"""The frozen product and its update in one kernel's accumulators, in Triton: forward, and the gradient of x.

y = x Wᵀ + b + scaling S Bᵀ        dX = dY W + drop'(dS A)
"""

# mypy: disable-error-code=no-untyped-def
import triton
import triton.language as tl
from torch import Tensor
from triton import Config

from . import mask
from .launch import launch, precision, size_class, tuned
from .lora_expand import update_tile
from .tiles import inner, load_tile, padded, per_thread, store_tile

GROUP = 8  # rows of tiles that are worked on together, so that W's tiles stay in the second cache


@tuned(
    [
        Config({"ROWS": 64, "COLUMNS": 64}, num_warps=4, num_stages=3),
        Config({"ROWS": 128, "COLUMNS": 64}, num_warps=4, num_stages=3),
        Config({"ROWS": 128, "COLUMNS": 128}, num_warps=8, num_stages=3),
        Config({"ROWS": 128, "COLUMNS": 128}, num_warps=8, num_stages=4),
    ],
    key=["N", "K", "r", "rows_class", "DROP", "PRECISION"],
    fits=lambda tile: per_thread(tile, tile["ROWS"] * tile["COLUMNS"]) <= (32 if tile["PRECISION"] == "ieee" else 64),
)
@triton.jit(do_not_specialize=["stream", "threshold", "rows_class"])
def fused_kernel(
    y, x, W, bias, S, B, M, N, K, r, x_step, W_step, W_next, S_step, B_step, B_next, scaling, seed, stream, threshold,
    rows_class, DROP: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    INNER: tl.constexpr, RANK: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of y[M, N] a program: keep ∘ (scaling S Bᵀ) + bias, then x Wᵀ on top of it."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS)
    group = program // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + program % (GROUP * tiles_n) % height
    tile_n = program % (GROUP * tiles_n) // height
    rows = tile_m.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tile_n.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = update_tile(
        S, B, M, N, r, S_step, B_step, B_next, scaling, seed, stream, threshold, rows, tile_n.to(tl.int64) * COLUMNS,
        DROP, ROWS, COLUMNS, RANK, STEP, PRECISION,
    )  # fmt: skip
    if BIAS:
        total += tl.load(bias + columns, columns < N, other=0.0).to(tl.float32)[None, :]
    for first in range(0, K, INNER):
        inner = first + tl.arange(0, INNER)
        left = load_tile(x, x_step, rows, inner, M, K)
        at = W + columns[None, :] * W_step + inner[:, None].to(tl.int64) * W_next
        right = tl.load(at, (columns < N)[None, :] & (inner < K)[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    store_tile(y, N, rows, columns, M, N, total)


def lora_fused(x: Tensor, W: Tensor, bias: Tensor | None, S: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y[M, N] = x[M, K] W[N, K]ᵀ + bias[N] + scaling · S[M, r] B[N, r]ᵀ."""
    return _fused(x, W, bias, S, B, scaling)


def lora_fused_grad(dY: Tensor, W: Tensor, dS: Tensor, A: Tensor, threshold: int, seed: Tensor, stream: int) -> Tensor:
    """dX[M, K] = dY[M, N] W[N, K] + drop'(dS[M, r] A[r, K])."""
    return _fused(dY, W.t(), None, dS, A.t(), mask.scale(threshold), threshold, seed, stream)


def _fused(
    x: Tensor, W: Tensor, bias: Tensor | None, S: Tensor, B: Tensor, scaling: float,
    threshold: int = 0, seed: Tensor | None = None, stream: int = 0,
) -> Tensor:  # fmt: skip
    """y = x Wᵀ + bias + keep ∘ (scaling · S Bᵀ); W and B with any two strides."""
    (M, K), (N, r) = x.shape, B.shape
    y = x.new_empty(M, N)
    launch(
        fused_kernel,
        lambda tile: triton.cdiv(M, tile["ROWS"]) * triton.cdiv(N, tile["COLUMNS"]),
        x,
        *(y, x, W, bias, S, B, M, N, K, r, x.stride(0), *W.stride(), S.stride(0), *B.stride(), scaling),
        *(seed, stream, threshold, size_class(M)),
        DROP=threshold > 0,
        BIAS=bias is not None,
        RANK=padded(r),
        STEP=min(padded(r), inner(r, x.dtype)),
        INNER=inner(1, x.dtype),
        GROUP=GROUP,
        PRECISION=precision(x.dtype),
    )
    return y
