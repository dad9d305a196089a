"""The dropout mask in Triton: the same bits as csrc/include/llmbuilder/philox.h and llmbuilder/ops/reference.py."""

# mypy: disable-error-code=no-untyped-def
# (Triton reads the annotations of a kernel as its own types.)
import triton
import triton.language as tl

PHILOX_ROUNDS = tl.constexpr(7)


def scale(threshold: int) -> float:
    """The factor of what is kept."""
    return 65536 / (65536 - threshold)


@triton.jit
def keep_tile(seed, rows, first_column, stream, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """keep[ROWS, COLUMNS] of these rows and of the columns from `first_column`, a multiple of 8, on.

    Counters lie on [ROWS, COLUMNS / 8], so that one Philox call serves eight elements; its words and their halves are
    then laid out side by side. One call an element would cost seven times as many multiplications.
    """
    calls = first_column // 8 + tl.arange(0, COLUMNS // 8)
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
