"""S = drop(x) Aᵀ in Triton, the mask drawn in registers: x is read once, nothing but S is written."""

# mypy: disable-error-code=no-untyped-def
import triton
import triton.language as tl
from torch import Tensor
from triton import Config

from . import mask
from .launch import launch, precision, size_class, tuned
from .mask import keep_tile
from .tiles import inner, load_tile, padded, per_thread, store_tile


@tuned(
    [
        Config({"ROWS": 32}, num_warps=4, num_stages=2),
        Config({"ROWS": 32}, num_warps=4, num_stages=4),
        Config({"ROWS": 32}, num_warps=8, num_stages=2),
        Config({"ROWS": 64}, num_warps=4, num_stages=3),
        Config({"ROWS": 128}, num_warps=8, num_stages=3),
    ],
    key=["K", "r", "rows_class", "DROP", "PRECISION"],
    fits=lambda tile: per_thread(tile, tile["ROWS"] * tile["RANK"]) <= (32 if tile["PRECISION"] == "ieee" else 64),
)
@triton.jit(do_not_specialize=["stream", "threshold", "rows_class"])
def shrink_kernel(
    x, A, S, M, K, r, x_step, A_step, A_next, seed, stream, threshold, scale, rows_class,
    DROP: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS rows of S a program. A's rows are A_step apart and its columns A_next."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANK)
    total = tl.zeros((ROWS, RANK), tl.float32)
    if DROP:
        key = tl.load(seed)
    for first in range(0, K, INNER):
        columns = first + tl.arange(0, INNER)
        value = load_tile(x, x_step, rows, columns, M, K)
        if DROP:
            value = tl.where(keep_tile(key, rows, first, stream, threshold, ROWS, INNER), value, 0.0)
        at = A + ranks[None, :].to(tl.int64) * A_step + columns[:, None].to(tl.int64) * A_next
        factor = tl.load(at, (columns < K)[:, None] & (ranks < r)[None, :], other=0.0)
        total = tl.dot(value, factor, total, input_precision=PRECISION)
    store_tile(S, r, rows, ranks, M, r, total * scale)


def lora_shrink(x: Tensor, A: Tensor, threshold: int, seed: Tensor, stream: int) -> Tensor:
    """S[M, r] = drop(x[M, K]) A[r, K]ᵀ in x's dtype."""
    return shrink(x, A, mask.scale(threshold), threshold, seed, stream)


def shrink(
    x: Tensor, A: Tensor, scale: float, threshold: int = 0, seed: Tensor | None = None, stream: int = 0
) -> Tensor:
    """scale · (keep ∘ x) Aᵀ; A with any two strides."""
    (M, K), r = x.shape, A.shape[0]
    S = x.new_empty(M, r)
    launch(
        shrink_kernel,
        lambda tile: triton.cdiv(M, tile["ROWS"]),
        x,
        *(x, A, S, M, K, r, x.stride(0), *A.stride(), seed, stream, threshold, scale, size_class(M)),
        DROP=threshold > 0,
        INNER=inner(r, x.dtype),
        RANK=padded(r),
        PRECISION=precision(x.dtype),
    )
    return S
