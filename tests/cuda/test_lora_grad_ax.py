"""lora_grad_ax in CUDA, emulated: dA = dSᵀ drop(x) and dX = drop'(dS A) against fp64 with the exported mask."""

import pytest
import torch
from gpusim.harness import poisoned
from gpusim.matrices import LAYOUTS, check_bits, guarded, laid_out
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmbuilder.ops import _cuda, reference

# How products are taken, and of which elements.
MATHS = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "tf32": torch.float32}
SEED = torch.tensor(-(2**62) - 12345)


def inputs(M, K, r, math):
    """x, dS, A"""
    return [torch.randn(*shape).to(MATHS[math]) for shape in ((M, K), (M, r), (r, K))]


def grad_ax(x, dS, A, threshold=0, math="bf16", layout="plain", need_x=True, seed=SEED, stream=0):
    """dA and dX, of whose memory nothing was known before and around which nothing was written."""
    (M, K), r = x.shape, len(A)
    dA, check_around_dA = guarded(r, K, torch.float32)
    dX, check_around_dX = guarded(M, K, x.dtype, layout)
    workspace = poisoned(_cuda._kernels.lora_grad_ax_workspace(_cuda._dtype(x), M, K, r) // 4)
    arguments = *map(_cuda._matrix, (x, dS, A)), _cuda._mask(seed, stream, threshold), dA.data_ptr()
    to = _cuda._matrix(dX) if need_x else (0, M, K, K)
    _cuda._kernels.lora_grad_ax(_cuda._dtype(x), *arguments, to, math == "tf32", workspace.data_ptr(), 0, 0)
    check_around_dA(), check_around_dX()
    return dA, dX


def formula(x, dS, A, threshold, seed=SEED, stream=0):
    """dA and dX in the operands' dtype."""
    keep, scale = reference.keep_mask(x.shape, threshold, seed, stream), 65536 / (65536 - threshold)
    return dS.t() @ torch.where(keep, x * scale, 0), torch.where(keep, (dS @ A) * scale, 0)


def yardstick(x, dS, A, math, *mask):
    """What torch makes of the same operands: dA, whose sums are never rounded to 16 bits, in fp32; dX in x's dtype."""
    wide = [t.float() for t in (x, dS, A)]
    if math == "tf32":
        return formula(*map(rounded_to_tf32, wide), *mask)
    return formula(*wide, *mask)[0], formula(x, dS, A, *mask)[1]


def rounded_to_tf32(x):
    """Ten bits of mantissa, ties away from zero."""
    return (x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)


@settings(deadline=None, max_examples=80)
@given(
    M=st.integers(0, 140),
    K=st.integers(1, 280) | st.sampled_from([63, 64, 128]),
    r=st.integers(1, 40) | st.integers(41, 256) | st.sampled_from([8, 16, 32, 33, 64, 65, 128, 256]),
    math=st.sampled_from(sorted(MATHS)),
    threshold=st.sampled_from([0, 1, 6554, 32768, 60000]),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
    schedule=st.integers(0, 3),
    seed=st.integers(0, 2**32),
)
@example(M=300, K=136, r=8, math="bf16", threshold=6554, layouts=["plain"] * 4, schedule=1, seed=0)  # several slabs
@example(M=40, K=63, r=300, math="f16", threshold=6554, layouts=["plain"] * 4, schedule=1, seed=0)  # several runs
@example(M=40, K=64, r=140, math="f32", threshold=6554, layouts=["slice"] * 4, schedule=1, seed=0)
@example(M=40, K=64, r=600, math="bf16", threshold=0, layouts=["aligned"] * 4, schedule=1, seed=0)
def test_errs_no_more_than_torch(emulator, check_error, M, K, r, math, threshold, layouts, schedule, seed):
    torch.manual_seed(seed)
    found, same, exact = [], [], []
    for _ in range(max(4, min(16, 256 // ((M + 1) * r)))):  # the largest error of a few numbers is chance
        operands = inputs(M, K, r, math)
        mask = threshold, torch.randint(-(2**63), 2**63 - 1, ()), int(torch.randint(2**32, ()))
        emulator.schedule(schedule)
        with emulator.serving():
            laid = map(laid_out, operands, layouts)
            found.append(grad_ax(*laid, threshold, math, layouts[3], seed=mask[1], stream=mask[2]))
        emulator.schedule(0)
        same.append(yardstick(*operands, math, *mask))
        exact.append(formula(*(t.double() for t in operands), *mask))
    for i, name in enumerate(("dA", "dX")):
        check_error(*([results[i] for results in way] for way in (found, same, exact)), name)


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("K", [63, 264])
@pytest.mark.parametrize("threshold, stream", [(16384, 0), (65535, 2**32 - 1), (1, 7)])
def test_the_mask_is_the_references_to_the_bit_in_both(cuda, math, K, threshold, stream):
    """dS = 1 in rank 0 alone and A = 1: dX shows what was kept. dS = unit vectors and x = 1: dA does."""
    M, scale = 40, torch.tensor(65536 / (65536 - threshold), dtype=torch.float32)
    keep = reference.keep_mask((M, K), threshold, SEED, stream)
    x, dS, A = torch.ones(M, K), torch.eye(M), torch.ones(M, K)
    dA, dX = grad_ax(*(t.to(MATHS[math]) for t in (x, dS, A)), threshold, math, stream=stream)
    assert torch.equal(dA, keep * scale)
    assert torch.equal(dX, (keep * scale).to(MATHS[math]))


@pytest.mark.parametrize("math", MATHS)
def test_what_is_dropped_counts_for_nothing_whatever_it_was(cuda, math):
    x, dS, A = inputs(40, 72, 8, math)
    keep = reference.keep_mask(x.shape, 32768, SEED, 0)
    spoilt = torch.where(keep, x, torch.nan)
    assert torch.equal(grad_ax(spoilt, dS, A, 32768, math)[0], grad_ax(x, dS, A, 32768, math)[0])
    dX = grad_ax(x, torch.full_like(dS, torch.inf), A.abs() + 1, 32768, math)[1]
    assert torch.equal(dX, torch.where(keep, torch.inf, 0).to(x.dtype))


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("r", [8, 32, 64, 128, 256, 272])
def test_where_x_needs_no_gradient_none_is_written_and_the_other_has_the_same_bits(cuda, math, r):
    operands = inputs(75, 100, r, math)
    dA, untouched = grad_ax(*operands, 6554, math, need_x=False)
    assert torch.equal(dA, grad_ax(*operands, 6554, math)[0])
    assert torch.isnan(untouched).all()


@pytest.mark.parametrize("math", ["bf16", "f32", "tf32"])
@pytest.mark.parametrize("r", [16, 40, 256])
def test_neither_schedule_nor_layout_nor_another_call_changes_a_bit(cuda, math, r):
    check_bits(cuda, lambda layout, *t: grad_ax(*t, 6554, math, layout), inputs(300, 150, r, math))


@pytest.mark.parametrize("M, K, r", [(0, 40, 8), (5, 0, 8), (0, 0, 300)])
def test_empty(cuda, M, K, r):
    dA, dX = grad_ax(*inputs(M, K, r, "bf16"), 6554)
    assert torch.equal(dA, torch.zeros(r, K))
    assert dX.shape == (M, K)


@pytest.mark.parametrize(
    "M, K, ranks, math, slabs",
    [
        (160, 256, [8], "bf16", 2),
        (300, 63, [16], "f16", 4),
        (260, 130, [32], "f32", 2),
        (300, 64, [64], "tf32", 1),
        (70, 72, [256], "bf16", 1),
        (40, 64, [256, 20], "bf16", 1),
        (40, 64, [128, 72], "f32", 1),
    ],
)
@pytest.mark.parametrize("layout", ["plain", "slice"])
def test_traffic_is_what_the_kernels_formula_says(cuda, M, K, ranks, math, slabs, layout):
    """A run for some ranks reads x once and writes dX once, and makes two launches, of which one adds the slabs up."""
    x, dS, A = (laid_out(t, layout) for t in inputs(M, K, sum(ranks), math))
    size = MATHS[math].itemsize
    with cuda.recording(x=x) as launches:
        grad_ax(x, dS, A, 6554, math, layout)
    assert [launch.grid[1] for launch in launches[::2]] == [slabs] * len(ranks)
    assert len(launches) == 2 * len(ranks)
    for some, first, second in zip(ranks, launches[::2], launches[1::2], strict=True):
        assert first.traffic["x"].bytes_read == first.traffic["x"].unique_read == M * K * size
        for launch, written in ((first, M * K * size + slabs * 4 * some * K), (second, 4 * some * K)):
            assert sum(t.bytes_written for t in launch.traffic.values()) == written
            assert sum(t.unique_written for t in launch.traffic.values()) == written
        assert sum(t.bytes_read for t in second.traffic.values()) == slabs * 4 * some * K


@pytest.mark.parametrize("math, product", [("bf16", 16 * 8 * 16), ("f16", 16 * 8 * 16), ("tf32", 16 * 8 * 8)])
@pytest.mark.parametrize("r, padded", [(1, 16), (16, 16), (20, 32), (64, 64), (100, 128), (256, 256)])
def test_no_product_but_those_of_the_padded_ranks_and_no_bank_conflict(cuda, math, product, r, padded):
    with cuda.recording() as launches:
        grad_ax(*inputs(64, 128, r, math), 6554, math)
    assert sum(launch.mma for launch in launches) * product == 2 * 64 * 128 * padded
    assert not any(launch.ldmatrix_conflicts for launch in launches)


def test_rows_further_apart_than_32_bits_count(cuda):
    operands = inputs(3, 40, 4, "bf16")
    memory = torch.UntypedStorage(2**32 + 2**12)  # of which nothing is touched but three rows
    far = torch.empty(0, dtype=torch.bfloat16).set_(memory, 0, (3, 40), (2**30 + 8, 1))
    far.copy_(operands[0])
    found = grad_ax(far, *operands[1:], 6554)
    assert all(torch.equal(a, b) for a, b in zip(found, grad_ax(*operands, 6554), strict=True))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dS": (64, 5, 0, 0), "A": (64, 0, 40, 40)}, "lora_grad_ax: the rank is 0"),
        ({"dS": (64, 4, 8, 8)}, r"lora_grad_ax: dS is \[4, 8\], expected \[5, 8\]"),
        ({"A": (64, 8, 39, 39)}, r"lora_grad_ax: A is \[8, 39\], expected \[8, 40\]"),
        ({"dX": (64, 5, 41, 41)}, r"lora_grad_ax: dX is \[5, 41\], expected \[5, 40\]"),
        ({"x": (64, 5, 40, 39)}, "lora_grad_ax: x: rows of 40 columns that are 39 apart overlap"),
        ({"x": (64, -1, 40, 40), "dS": (64, -1, 8, 8)}, "lora_grad_ax: x has a negative size"),
        ({"x": (0, 5, 40, 40)}, "lora_grad_ax: x is null"),
        ({"dA": 0}, "lora_grad_ax: dA is null"),
        ({"workspace": 0}, "lora_grad_ax: the workspace is null"),
        ({"workspace": 72}, "lora_grad_ax: the workspace must be at a multiple of 16 bytes"),
        ({"mask": (0, 0, 6554)}, "lora_grad_ax: the mask's seed is null"),
        ({"mask": (64, 0, 65536)}, "lora_grad_ax: the mask's threshold is 65536, must be below 65536"),
    ],
)
def test_the_launcher_refuses(cuda, change, words):
    bf16 = _cuda._kernels.DType.bf16
    right = {"dtype": bf16, "x": (64, 5, 40, 40), "dS": (64, 5, 8, 8), "A": (64, 8, 40, 40), "mask": (64, 0, 6554)}
    right |= {"dA": 64, "dX": (64, 5, 40, 40), "tf32": False, "workspace": 64, "device": 0, "stream": 0}
    with cuda.recording() as launches, pytest.raises(ValueError, match=words):
        _cuda._kernels.lora_grad_ax(*(right | change).values())
    assert not launches
