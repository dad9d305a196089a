"""dS = scaling dY B and dB = scaling dYᵀ S in Triton: in one pass over dY up to rank 32, else in two."""

# mypy: disable-error-code=no-untyped-def
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import Config

from .launch import launch, precision, size_class, tuned
from .lora_grad_ax import grad_ax
from .lora_shrink import shrink
from .sums import sum_parts
from .tiles import load_tile, padded, per_thread, store_tile

# Above, the partial sums of two results cost more than to read dY again; and products by FMA have no registers for it.
ONE_PASS_RANK = 32
# Of a program. Partial sums of dS are N/COLUMNS, those of dB M/PART_ROWS times as large as the result.
PART_ROWS, COLUMNS = 512, 256


@tuned(
    [
        Config({"ROWS": 32}, num_warps=4, num_stages=3),
        Config({"ROWS": 64}, num_warps=4, num_stages=2),
        Config({"ROWS": 32}, num_warps=8, num_stages=2),
    ],
    key=["N", "r", "rows_class"],
    fits=lambda tile: per_thread(tile, tile["RANK"] * COLUMNS) <= 64,
)
@triton.jit(do_not_specialize=["rows_class"])
def grad_sb_kernel(
    dY, S, B, dS_parts, dB_parts, M, N, r, dY_step, S_step, B_step, scaling, rows_class,
    PART_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """PART_ROWS rows and COLUMNS columns of dY a program: their parts of dS and dB."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(N, COLUMNS)
    part, block = program // blocks, program % blocks
    columns, ranks = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANK)
    factor = load_tile(B, B_step, columns, ranks, N, r)
    total = tl.zeros((COLUMNS, RANK), tl.float32)
    for start in range(part * PART_ROWS, tl.minimum((part + 1) * PART_ROWS, M), ROWS):
        rows = start + tl.arange(0, ROWS)
        slope = load_tile(dY, dY_step, rows, columns, M, N)
        shrunk = load_tile(S, S_step, rows, ranks, M, r)
        total = tl.dot(tl.trans(slope), shrunk, total, input_precision=PRECISION)
        update = tl.dot(slope, factor, input_precision=PRECISION) * scaling
        store_tile(dS_parts + block * M * r, r, rows, ranks, M, r, update)
    store_tile(dB_parts + part * N * r, r, columns, ranks, N, r, total * scaling)


def lora_grad_sb(dY: Tensor, S: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """dS[M, r] = scaling · dY[M, N] B[N, r] in dY's dtype, and dB[N, r] = scaling · dYᵀ S in fp32."""
    dB = B.new_empty(B.shape, dtype=torch.float32)
    if B.shape[1] <= ONE_PASS_RANK and precision(dY.dtype) != "ieee":
        return _one_pass(dY, S, B, dB, scaling), dB
    grad_ax(dY, S, None, dB, (1, B.shape[1]), None, scaling)
    return shrink(dY, B.t(), scaling), dB


def _one_pass(dY: Tensor, S: Tensor, B: Tensor, dB: Tensor, scaling: float) -> Tensor:
    (M, N), r = dY.shape, B.shape[1]
    dS = dY.new_empty(M, r)
    blocks, parts = triton.cdiv(N, COLUMNS), triton.cdiv(M, PART_ROWS)
    dS_parts, dB_parts = dB.new_empty(blocks, M, r), dB.new_empty(parts, N, r)
    launch(
        grad_sb_kernel,
        blocks * parts,
        dY,
        *(dY, S, B, dS_parts, dB_parts, M, N, r, dY.stride(0), S.stride(0), B.stride(0), scaling, size_class(M)),
        PART_ROWS=PART_ROWS,
        COLUMNS=COLUMNS,
        RANK=padded(r),
        PRECISION=precision(dY.dtype),
    )
    sum_parts(dS_parts, dS, dB_parts, dB)
    return dS
