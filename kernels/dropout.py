"""Dropout in Triton, with the mask of csrc/include/llmbuilder/philox.h and llmbuilder/ops/reference.py, bit for bit."""

# mypy: disable-error-code=no-untyped-def
# (Triton reads the annotations of a kernel as its own types.)
import torch
import triton
import triton.language as tl

PHILOX_ROUNDS = tl.constexpr(7)
ROWS, COLUMNS = 4, 512  # of a tile: 16 elements a thread, of which a Philox call serves 8


@triton.jit
def keep_tile(seed, rows, first_call, stream, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """keep[ROWS, COLUMNS] for columns from 8 * first_call on.

    Counters lie on [ROWS, COLUMNS / 8], so that one Philox call serves eight elements; its words and their halves are
    then laid out side by side. One call an element would cost seven times as many multiplications.
    """
    calls = first_call + tl.arange(0, COLUMNS // 8)
    zero = tl.zeros((ROWS, COLUMNS // 8), tl.uint32)
    c0, c1, c2, c3 = tl.philox(
        seed,
        zero + calls[None, :].to(tl.uint32),
        zero + rows[:, None].to(tl.uint32),
        zero + stream.to(tl.uint32),
        zero,
        n_rounds=PHILOX_ROUNDS,
    )
    words = tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (ROWS, COLUMNS // 2))
    slices = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (ROWS, COLUMNS))
    return slices >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["stream", "threshold"])
def dropout_kernel(x, y, M, K, seed, stream, threshold, scale, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One tile a program; programs go along a row of tiles first (grid.x alone has no limit of 65,535)."""
    program = tl.program_id(0).to(tl.int64)
    rows = program // tiles * ROWS + tl.arange(0, ROWS)
    first = program % tiles * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    at = rows[:, None] * K + columns[None, :]
    keep = keep_tile(tl.load(seed), rows, first // 8, stream, threshold, ROWS, COLUMNS)
    value = tl.load(x + at, inside, other=0.0).to(tl.float32) * scale
    tl.store(y + at, tl.where(keep, value, 0.0).to(y.dtype.element_ty), inside)


def dropout(x: torch.Tensor, threshold: int, seed: torch.Tensor, stream: int) -> torch.Tensor:
    """x * keep * 65536/(65536 - threshold) for a contiguous x of fp32, bf16 or fp16."""
    y = torch.empty_like(x)
    if not x.numel():
        return y
    K = x.shape[-1] if x.dim() else 1
    M, tiles = x.numel() // K, triton.cdiv(K, COLUMNS)
    scale = 65536 / (65536 - threshold)
    grid = (triton.cdiv(M, ROWS) * tiles,)
    dropout_kernel[grid](x, y, M, K, seed, stream, threshold, scale, tiles, ROWS=ROWS, COLUMNS=COLUMNS)
    return y
