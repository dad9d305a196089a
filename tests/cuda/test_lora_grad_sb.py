"""lora_grad_sb in CUDA, emulated: dS = scaling dY B and dB = scaling dYᵀ S against fp64."""

import pytest
import torch
from gpusim.harness import poisoned
from gpusim.matrices import LAYOUTS, check_bits, guarded, laid_out
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmbuilder.ops import _cuda, reference

# How products are taken, and of which elements.
MATHS = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "tf32": torch.float32}


def inputs(M, N, r, math):
    """dY, S, B"""
    return [torch.randn(*shape).to(MATHS[math]) for shape in ((M, N), (M, r), (N, r))]


def grad_sb(dY, S, B, scaling=1.0, math="bf16", layout="plain"):
    """dS and dB, of whose memory nothing was known before and around which nothing was written."""
    (M, N), r = dY.shape, B.shape[1]
    dS, check_around_dS = guarded(M, r, dY.dtype, layout)
    dB, check_around_dB = guarded(N, r, torch.float32)
    workspace = poisoned(_cuda._kernels.lora_grad_sb_workspace(_cuda._dtype(dY), M, N, r) // 4)
    arguments = *map(_cuda._matrix, (dY, S, B)), scaling, _cuda._matrix(dS), dB.data_ptr()
    _cuda._kernels.lora_grad_sb(_cuda._dtype(dY), *arguments, math == "tf32", workspace.data_ptr(), 0, 0)
    check_around_dS(), check_around_dB()
    return dS, dB


def yardstick(dY, S, B, scaling, math):
    """What torch makes of the same operands: dS in dY's dtype; dB, whose sums are never rounded to 16 bits, in fp32."""
    wide = [t.float() for t in (dY, S, B)]
    if math == "tf32":
        return reference.lora_grad_sb(*map(rounded_to_tf32, wide), scaling)
    return reference.lora_grad_sb(dY, S, B, scaling)[0], reference.lora_grad_sb(*wide, scaling)[1]


def rounded_to_tf32(x):
    """Ten bits of mantissa, ties away from zero."""
    return (x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)


@settings(deadline=None, max_examples=80)
@given(
    M=st.integers(0, 140),
    N=st.integers(0, 300) | st.sampled_from([63, 64, 128, 256]),
    r=st.integers(1, 40) | st.integers(41, 256) | st.sampled_from([8, 16, 32, 33, 64, 65, 128, 256]),
    scaling=st.sampled_from([1.0, 0.25, -3.7]),
    math=st.sampled_from(sorted(MATHS)),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
    schedule=st.integers(0, 3),
    seed=st.integers(0, 2**32),
)
@example(M=300, N=530, r=8, scaling=2.0, math="bf16", layouts=["plain"] * 4, schedule=1, seed=0)  # slabs and blocks
@example(M=300, N=530, r=40, scaling=2.0, math="f16", layouts=["offset"] * 4, schedule=1, seed=0)
@example(M=40, N=63, r=300, scaling=2.0, math="f16", layouts=["plain"] * 4, schedule=1, seed=0)  # several runs
@example(M=40, N=64, r=140, scaling=2.0, math="f32", layouts=["slice"] * 4, schedule=1, seed=0)  # then one pass
def test_errs_no_more_than_torch(emulator, check_error, M, N, r, scaling, math, layouts, schedule, seed):
    torch.manual_seed(seed)
    found, same, exact = [], [], []
    for _ in range(max(4, min(16, 256 // ((min(M, N) + 1) * r)))):  # the largest error of a few numbers is chance
        operands = inputs(M, N, r, math)
        emulator.schedule(schedule)
        with emulator.serving():
            found.append(grad_sb(*map(laid_out, operands, layouts), scaling, math, layouts[3]))
        emulator.schedule(0)
        same.append(yardstick(*operands, scaling, math))
        exact.append(reference.lora_grad_sb(*(t.double() for t in operands), scaling))
    for i, name in enumerate(("dS", "dB")):
        check_error(*([results[i] for results in way] for way in (found, same, exact)), name)


@pytest.mark.parametrize("math", ["bf16", "f32", "tf32"])
@pytest.mark.parametrize("r", [16, 40, 256])
def test_neither_schedule_nor_layout_nor_another_call_changes_a_bit(cuda, math, r):
    check_bits(cuda, lambda layout, *t: grad_sb(*t, 0.7, math, layout), inputs(300, 150, r, math))


@pytest.mark.parametrize("r", [8, 40, 300])
@pytest.mark.parametrize("M, N", [(0, 40), (5, 0), (0, 0)])
def test_sums_of_nothing_are_zero(cuda, M, N, r):
    dS, dB = grad_sb(*inputs(M, N, r, "bf16"))
    assert torch.equal(dS, torch.zeros(M, r).bfloat16())
    assert torch.equal(dB, torch.zeros(N, r))


def test_what_is_not_finite_goes_to_its_own_row_and_columns_alone(cuda):
    """Padding is zero, and never a product of zero with what lies beyond."""
    dY, S, B = inputs(40, 70, 5, "bf16")
    dY[3, 7] = torch.inf
    dS, dB = grad_sb(dY, S, B)
    assert (~torch.isfinite(dS)).nonzero()[:, 0].unique().tolist() == [3]
    assert (~torch.isfinite(dB)).nonzero()[:, 0].unique().tolist() == [7]


@pytest.mark.parametrize(
    "M, N, r, math, passes, parts_of_dS, parts_of_dB",
    [
        (300, 530, 8, "bf16", 1, 2, 4),
        (300, 63, 32, "f16", 1, 1, 2),
        (140, 256, 16, "f32", 1, 1, 2),
        (40, 70, 33, "bf16", 2, 1, 1),
        (70, 600, 64, "f16", 2, 2, 1),
        (600, 72, 64, "tf32", 2, 1, 2),
        (70, 72, 256, "bf16", 2, 1, 1),
    ],
)
@pytest.mark.parametrize("layout", ["plain", "slice"])
def test_traffic_is_what_the_kernels_formula_says(cuda, M, N, r, math, passes, parts_of_dS, parts_of_dB, layout):
    """dY is read once up to 32 ranks and twice above; the last launch adds the parts up."""
    dY, S, B = (laid_out(t, layout) for t in inputs(M, N, r, math))
    size, parts = MATHS[math].itemsize, 4 * r * (parts_of_dS * M + parts_of_dB * N)
    with cuda.recording(dY=dY) as launches:
        grad_sb(dY, S, B, 1.0, math, layout)
    *products, last = launches
    assert len(products) == passes
    for launch in products:
        assert launch.traffic["dY"].bytes_read == launch.traffic["dY"].unique_read == M * N * size
    for some, written in ((products, parts), ([last], size * M * r + 4 * N * r)):
        assert sum(t.bytes_written for launch in some for t in launch.traffic.values()) == written
        assert sum(t.unique_written for launch in some for t in launch.traffic.values()) == written
    assert sum(t.bytes_read for t in last.traffic.values()) == parts


@pytest.mark.parametrize("math, product", [("bf16", 16 * 8 * 16), ("f16", 16 * 8 * 16), ("tf32", 16 * 8 * 8)])
@pytest.mark.parametrize("r, padded", [(1, 16), (16, 16), (20, 32), (64, 64), (100, 128), (256, 256)])
def test_no_product_but_those_of_the_padded_ranks_and_no_bank_conflict(cuda, math, product, r, padded):
    with cuda.recording() as launches:
        grad_sb(*inputs(64, 512, r, math), 1.0, math)
    assert sum(launch.mma for launch in launches) * product == 2 * 64 * 512 * padded
    assert not any(launch.ldmatrix_conflicts for launch in launches)


@pytest.mark.parametrize("r", [4, 40])
def test_rows_further_apart_than_32_bits_count(cuda, r):
    operands = inputs(3, 40, r, "bf16")
    memory = torch.UntypedStorage(2**32 + 2**12)  # of which nothing is touched but three rows
    far = torch.empty(0, dtype=torch.bfloat16).set_(memory, 0, (3, 40), (2**30 + 8, 1))
    far.copy_(operands[0])
    found = grad_sb(far, *operands[1:])
    assert all(torch.equal(a, b) for a, b in zip(found, grad_sb(*operands), strict=True))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"S": (64, 5, 0, 0), "B": (64, 40, 0, 0), "dS": (64, 5, 0, 0)}, "lora_grad_sb: the rank is 0"),
        ({"S": (64, 4, 8, 8)}, r"lora_grad_sb: S is \[4, 8\], expected \[5, 8\]"),
        ({"B": (64, 39, 8, 8)}, r"lora_grad_sb: B is \[39, 8\], expected \[40, 8\]"),
        ({"dS": (64, 5, 9, 9)}, r"lora_grad_sb: dS is \[5, 9\], expected \[5, 8\]"),
        ({"dY": (64, 5, 40, 39)}, "lora_grad_sb: dY: rows of 40 columns that are 39 apart overlap"),
        ({"dY": (64, -1, 40, 40), "S": (64, -1, 8, 8)}, "lora_grad_sb: dY has a negative size"),
        ({"dY": (0, 5, 40, 40)}, "lora_grad_sb: dY is null"),
        ({"dB": 0}, "lora_grad_sb: dB is null"),
        ({"workspace": 0}, "lora_grad_sb: the workspace is null"),
        ({"workspace": 72}, "lora_grad_sb: the workspace must be at a multiple of 16 bytes"),
    ],
)
def test_the_launcher_refuses(cuda, change, words):
    bf16 = _cuda._kernels.DType.bf16
    right = {"dtype": bf16, "dY": (64, 5, 40, 40), "S": (64, 5, 8, 8), "B": (64, 40, 8, 8), "scaling": 1.0}
    right |= {"dS": (64, 5, 8, 8), "dB": 64, "tf32": False, "workspace": 64, "device": 0, "stream": 0}
    with cuda.recording() as launches, pytest.raises(ValueError, match=words):
        _cuda._kernels.lora_grad_sb(*(right | change).values())
    assert not launches
