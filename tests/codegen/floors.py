"""What the kernels' code must reach, worked out from their arithmetic and not from what a compiler happened to make.

**Products.** mma.m16n8k16 does 16 · 8 · 16 multiplications, so an operator of whole tiles executes its products divided
by that, and one that pads executes the padded product. In the machine code each mma.sync is one HMMA.

**Mask.** Seven rounds of Philox take two 32x32 bit multiplications with a high word each, and a call decides eight
elements: 14 / 8 = 1.75 such multiplications an element, up to 1.3 times that. Four of the 14 depend on column and
stream alone, so that a thread that masks several rows may do with 10 / 8.

**Vectors.** Every byte of x, y, dY and dX travels once a pass in accesses of 16 bytes, which fill whole sectors.

**In flight.** A kernel that memory bounds must keep as many bytes under way as memory delivers while one request is
answered (Little's law): bandwidth · latency / multiprocessors. With 500 ns and the fastest memory sold with each
architecture that is between 3 and 27 KiB a multiprocessor. Blocks that fit on one times the bytes that a block requests
before it needs the first of them must reach it.

**Spills.** None, and no local memory: every sum fits in registers by choice of tile.
"""

import re
from collections.abc import Callable
from math import ceil

from codegen import occupancy

PHILOX, SHARED_PHILOX = 14 / 8, 10 / 8

# Multiplications of an operator on [M, N], [M, K] and rank r.
PRODUCTS: dict[str, Callable[[int, int, int, int], int]] = {
    "lora_shrink": lambda M, N, K, r: M * K * r,
    "lora_expand": lambda M, N, K, r: M * N * r,
    "lora_grad_sb": lambda M, N, K, r: 2 * M * N * r,
    "lora_grad_ax": lambda M, N, K, r: 2 * M * K * r,
    "lora_fused": lambda M, N, K, r: M * N * (K + r),
    "lora_fused_grad": lambda M, N, K, r: M * K * (N + r),
}
MASKED = ("lora_shrink", "lora_grad_ax", "lora_fused_grad")
READ = {
    "lora_shrink": ("x",),
    "lora_expand": (),
    "lora_grad_sb": ("dY",),
    "lora_grad_ax": ("x",),
    "lora_fused": ("x",),
    "lora_fused_grad": ("dY",),
}
# Passes over the banks of shared memory, beside the fewest that the same bytes take. ldmatrix meets no conflict at all;
# what is above 1 are copies of 16 bytes into rows of 16 or 32 ranks, of which eight begin twice in four banks.
BANKS = {"lora_grad_sb": 1.055, "lora_grad_ax": 1.034}
TWO_PASSES_ABOVE = 32  # ranks, of lora_grad_sb
FUSED_SIDE = 128  # columns of a block of lora_fused


def passes(operator: str, N: int, K: int, r: int) -> int:
    """How often an operator asks for the matrix that it reads."""
    if operator.startswith("lora_fused"):
        return ceil((N if operator == "lora_fused" else K) / FUSED_SIDE)
    return 2 if operator == "lora_grad_sb" and r > TWO_PASSES_ABOVE else 1


LATENCY = 500e-9
# GB/s and multiprocessors: A100 80 GB, RTX A6000, L40S, H100 SXM, B200, RTX 5090
FASTEST = {80: (2039, 108), 86: (768, 84), 89: (864, 142), 90: (3350, 132), 100: (8000, 148), 120: (1792, 170)}


def needed_in_flight(architecture: int) -> int:
    """Bytes a multiprocessor."""
    bandwidth, multiprocessors = FASTEST[architecture]
    return ceil(bandwidth * 1e9 * LATENCY / multiprocessors)


# Dense TFLOP/s of the same: tensor cores on 16 bits (half of it on tf32), FMA on fp32
PEAK = {80: (312, 19), 86: (155, 39), 89: (362, 92), 90: (990, 67), 100: (2250, 80), 120: (210, 105)}


def in_flight(name: str, size: int, numbers: list[int], threads: int) -> int:
    """Bytes that a block asks of the big matrices before it waits for the first."""
    if name == "dropout_kernel":
        return threads * 8 * size  # eight elements a thread
    if name == "penalty_kernel":
        return threads * 3 * 16  # a vector each of theta, anchor and gradient, where there are no Fisher values
    if name == "accumulate_kernel":
        return threads * 2 * 16
    if name == "shrink_kernel":
        return threads * 2 * numbers[1] * 8 * size  # a lane's Eights of the next step
    if name == "grad_ax_kernel":
        return 8 * numbers[3] * numbers[2] * numbers[4] * size  # the next tile of x
    return {"grad_sb_kernel": 16384, "grad_side_kernel": 8192}[name]  # the next tile of dY


def blocks_needed(kernel: str, threads: int, architecture: int) -> int:
    """Blocks that keep a multiprocessor's memory busy, as far as its threads reach; 1 where products are the bound."""
    name, arguments = kernel.partition("<")[::2]
    size = 4 if re.search(r"\bfloat\b|FP32|TF32", arguments) else 2
    numbers = [int(n) for n in re.findall(r"\b\d+\b", arguments)]
    bandwidth, _ = FASTEST[architecture]
    tensor, fma = PEAK[architecture]
    if name in ("shrink_kernel", "grad_side_kernel", "grad_ax_kernel", "grad_sb_kernel"):
        products = 2 if name == "grad_sb_kernel" else 1  # for each element that is read or written
        peak = fma if "FP32" in arguments else tensor * 2 / size
        if 2 * products * numbers[0] / size > peak * 1e3 / bandwidth:
            return 1
    elif name not in ("dropout_kernel", "penalty_kernel", "accumulate_kernel"):
        return 1
    blocks = ceil(needed_in_flight(architecture) / in_flight(name, size, numbers, threads))
    return min(blocks, occupancy.LIMITS[architecture].threads // threads)


# Where the floor is missed: B200's memory asks for more blocks than the kernels' registers leave room for; and at 256
# ranks, on an H100 near the bound of their products, shrink and grad_ax have half of what it takes.
MISSED = {("dropout_kernel", 100), ("shrink_kernel", 100), ("grad_ax_kernel", 100), ("grad_side_kernel", 100)}
MISSED |= {("shrink_kernel", 90), ("grad_ax_kernel", 90)}
