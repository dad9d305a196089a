"""Gates on the machine code of the Triton kernels, for every architecture, with no GPU and no driver.

What is compiled is what the operators launch for a layer of 4096 x 4096 in bf16 at rank 16 with dropout, with the first
of the tiles that each is tuned over; CORNERS adds large ranks and fp32, where registers are short.
"""

import dataclasses
import re

import pytest
import torch

pytest.importorskip("triton")
import aot
from codegen import occupancy, sass

if sass.tool("cuobjdump") is None:
    pytest.skip("no disassembler here", allow_module_level=True)

M = N = K = 4096
PHILOX_CALL = 14  # wide products: two a round, seven rounds; a call serves eight elements
MMA = 16 * 8 * 16  # multiply-adds of an HMMA.16816, by a warp; those of an HGMMA stand in its name


@dataclasses.dataclass(frozen=True)
class Floor:
    """What the operator's arithmetic asks of one tile, worked out by hand; a thread's share of it is a division.

    Registers: accumulators and values in fp32 (one each), fragments of operands in bf16 (half a register each), and
    `rest` for what does not depend on the tile: addresses and masks of a tile in flight (some 24), the loop (8), and
    where there is a mask a Philox call's ten words and their products (24).
    """

    products: int = 0  # multiply-adds of a tile, rank padded to 16
    masked: int = 0  # elements whose mask is drawn
    read: int = 0  # bytes of the operands that are as large as x, each read by 16-byte accesses
    accumulators: int = 0  # elements of the sums that are held
    values: int = 0  # elements in registers besides
    fragments: int = 0  # bf16 elements of operands in registers
    rest: int = 40
    asynchronous: bool = False  # loads that run ahead of a loop
    doubles: bool = False  # fp64 is meant


R, MASKED = 16, 64
FLOORS = {
    # 4 x 512 elements; in fp32 while they are scaled
    "dropout_kernel": Floor(masked=4 * 512, read=4 * 512 * 2, values=4 * 512),
    # x [32, 64] and A [16, 64] a step; each of 4 warps holds its x and all of A
    "shrink_kernel": Floor(
        products=32 * 64 * R,
        masked=32 * 64,
        accumulators=32 * R,
        values=32 * 64,
        fragments=32 * 64 + 4 * 64 * R,
        rest=MASKED,
        asynchronous=True,
    ),
    # y [64, 64], one step of the rank, a bias in fp32
    "expand_kernel": Floor(products=64 * 64 * R, accumulators=64 * 64, values=64 * 64, fragments=2 * 64 * R * 4),
    # dY [32, 256], B [256, 16] held by each of 4 warps for the whole loop; dB's sums and one step's dS
    "grad_sb_kernel": Floor(
        products=2 * 32 * 256 * R,
        accumulators=256 * R + 32 * R,
        values=0,
        fragments=2 * 32 * 256 + 4 * 256 * R,
        rest=48,
        asynchronous=True,
    ),
    # x [16, 64], A [16, 64] held by each of 4 warps; dA's sums, dX's tile, the mask for both
    "grad_ax_kernel": Floor(
        products=2 * 16 * 64 * R,
        masked=16 * 64,
        accumulators=64 * R + 16 * 64,
        values=2 * 16 * 64,
        fragments=4 * 64 * R + 4 * 16 * R,
        rest=MASKED,
        asynchronous=True,
    ),
    # y [64, 64] over 64 of K a step, and one step of the rank
    "fused_kernel": Floor(
        products=64 * 64 * (64 + R),
        accumulators=64 * 64,
        values=64 * 64,
        fragments=4 * 2 * 64 * 32,
        asynchronous=True,
    ),
    "sum_parts_kernel": Floor(values=2 * 1024, rest=32),
    # 1024 elements of theta, anchor, Fisher and gradient; their share of the value in fp64 (two registers)
    "penalty_kernel": Floor(read=4 * 1024 * 2, accumulators=2 * 1024, values=4 * 1024, doubles=True),
    "value_kernel": Floor(accumulators=2 * 1024, values=2 * 1024, doubles=True),
    "accumulate_kernel": Floor(read=2 * 1024 * 2, values=2 * 1024),
    # 4096 columns of a row, twice, by 8 warps
    "cross_entropy_kernel": Floor(read=2 * 4096 * 2, values=2 * 4096),
}


def layer(dtype, r):
    """Operators by name, on tensors whose values nobody reads."""
    from llmbuilder.kernels import cross_entropy, dropout, ewc, lora

    def empty(*shape):
        return torch.empty(*shape, dtype=dtype)

    x, W, bias, A, B, S = empty(M, K), empty(N, K), empty(N), empty(r, K), empty(N, r), empty(M, r)
    param, mask = empty(1 << 16), (6554, torch.tensor(0), 3)
    param.grad = empty(1 << 16)
    return {
        "dropout": lambda: dropout.dropout(x, *mask),
        "lora_shrink": lambda: lora.lora_shrink(x, A, *mask),
        "lora_expand": lambda: lora.lora_expand(S, B, bias, 1.5),
        "lora_grad_sb": lambda: lora.lora_grad_sb(x, S, B, 1.5),
        "lora_grad_ax": lambda: lora.lora_grad_ax(x, S, A, *mask, True),
        "lora_fused": lambda: lora.lora_fused(x, W, bias, S, B, 1.5),
        "lora_fused_grad": lambda: lora.lora_fused_grad(x, W, S, A, *mask),
        "ewc_penalty_": lambda: ewc.ewc_penalty_([param], [param], [param], 1.0),
        "ewc_accumulate_": lambda: ewc.ewc_accumulate_([param], [param.grad], 1.0),
        "softmax_cross_entropy_": lambda: cross_entropy.softmax_cross_entropy_(
            empty(64, 128256), torch.zeros(64, dtype=torch.int64), None, 0.0, True
        ),
    }


def compiled(architecture, dtype=torch.bfloat16, r=R, only=None, config=0):
    """(operator, kernel) of all launches."""
    pairs = []
    for operator, call in layer(dtype, r).items():
        if only is None or operator in only:
            with aot.target(architecture, config) as kernels:
                call()
            pairs += [(operator, kernel) for kernel in kernels]
    return pairs


def spilled(kernel):
    count, stack = kernel.sass.count(r"STL|LDL"), kernel.sass.stack + kernel.sass.local
    return f"{count} accesses to local memory, {stack} bytes of it" if count or stack else ""


def check_no_spills(kernel):
    assert not spilled(kernel), spilled(kernel)
    limit = occupancy.LIMITS[kernel.architecture].shared_of_block
    assert kernel.shared <= limit, f"{kernel.shared} bytes of shared memory, of {limit}"
    blocks = occupancy.blocks(kernel.architecture, kernel.threads, kernel.sass.registers, kernel.shared)
    assert blocks >= 1, "no multiprocessor holds a block"


def check_registers(floor, kernel, masked):
    shared_out = floor.accumulators + floor.values + floor.fragments / 2 + masked / 2
    bound = shared_out / kernel.threads + floor.rest
    # The compiler works on two steps of a loop at a time, gives registers by eights, and has an ABI to keep.
    assert kernel.sass.registers <= 1.5 * bound + 8, f"{kernel.sass.registers} registers, {bound:.0f} are needed"


def check_products(floor, kernel):
    """Tensor cores, and no more products than the padded tile has, where the code says how many."""
    assert kernel.sass.count(r"HMMA|HGMMA|UTC\w*MMA"), "tensor cores are not used"
    assert kernel.sass.count(r"FFMA") * 32 * kernel.warps < floor.products / 4, "products by FMA"
    if kernel.architecture == 100:
        return  # the size of a tcgen05 product stands in a descriptor
    done = kernel.sass.count(r"HMMA\.16816\.F32\.BF16") * MMA * kernel.warps
    for opcode, _ in kernel.sass.instructions:
        if size := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.F32\.BF16", opcode):
            done += int(size[1]) * int(size[2]) * int(size[3]) * kernel.warps // 4
    # dS of 32 rows by rank 16 is four products wide by two: half of what four warps do there is done twice.
    allowed = 1.5 * floor.products if kernel.name == "grad_sb_kernel" else floor.products
    assert floor.products <= done <= allowed, f"{done} multiply-adds, the tile has {floor.products}"


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_code_of_every_operator(architecture):
    wrong = []
    for operator, kernel in compiled(architecture):
        floor = FLOORS[kernel.name]
        masked = floor.masked or (64 * 64 if operator == "lora_fused_grad" else 0)
        for check in gates(floor, kernel, masked):
            try:
                check()
            except AssertionError as error:
                wrong.append(f"{operator}, {kernel.name}: {str(error).splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


def gates(floor, kernel, masked):
    yield lambda: check_no_spills(kernel)
    yield lambda: check_registers(floor, kernel, masked)
    if floor.products:
        yield lambda: check_products(floor, kernel)
    if masked:
        yield lambda: check_philox(kernel, masked)
    if floor.read:
        yield lambda: check_vectors(floor, kernel)
    if floor.asynchronous:
        yield lambda: check_asynchronous(kernel)
    yield lambda: check_doubles(floor, kernel)


def check_philox(kernel, masked):
    ideal = PHILOX_CALL * masked / 8 / kernel.threads
    found = aot.wide_multiplies(kernel)
    assert 0 < found <= 1.3 * ideal, f"{found} wide multiplies a thread, ideally {ideal}"


def check_vectors(floor, kernel):
    found = 16 * kernel.threads * kernel.sass.count(r"LDG\.E\S*\.128")
    assert found >= floor.read, f"{found} bytes are read by 16 at a time, the operands have {floor.read}"


def check_asynchronous(kernel):
    assert kernel.sass.count(r"LDGSTS|UTMALDG"), "no load runs ahead"


def check_doubles(floor, kernel):
    found = kernel.sass.count(r"D(ADD|MUL|FMA)|F2F\.F64")
    assert floor.doubles or not found, f"{found} instructions in fp64"


PRODUCTS = ("lora_shrink", "lora_expand", "lora_grad_sb", "lora_grad_ax", "lora_fused", "lora_fused_grad")
CORNERS = [(torch.bfloat16, 64), (torch.bfloat16, 256), (torch.float32, 16), (torch.float32, 256)]


@pytest.mark.parametrize("dtype, r", CORNERS, ids=str)
def test_nothing_spills_at_large_ranks_and_in_fp32(dtype, r):
    kernels = compiled(86, dtype, r, PRODUCTS)
    assert not [f"{operator}, {kernel.name}: {said}" for operator, kernel in kernels if (said := spilled(kernel))]


@pytest.fixture
def tf32_as_it_was():
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_fp32_products_are_exact_unless_torch_allows_tf32(tf32_as_it_was):
    def opcodes():
        ((_, kernel),) = compiled(80, torch.float32, R, ["lora_shrink"])
        return kernel.sass.mix()

    assert opcodes()["HMMA"] == 0 and opcodes()["FFMA"] > 0
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert opcodes()["HMMA"] > 0


def test_an_operand_out_of_line_takes_the_scalar_loads():
    """K = 63: rows start anywhere, so that no access is wider than an element's alignment allows."""
    from llmbuilder.kernels.dropout import dropout

    with aot.target(80) as kernels:
        dropout(torch.empty(64, 63, dtype=torch.bfloat16), 6554, torch.tensor(0), 3)
    assert kernels[0].sass.count(r"LDG\.E\.128") == 0 and kernels[0].sass.count(r"LDG\.E\.U16") > 0
