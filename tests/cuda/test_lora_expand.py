"""lora_expand in CUDA, emulated: y = scaling S B^T + bias against fp64, its traffic, and what it refuses."""

import pytest
import torch
from gpusim.harness import poisoned
from gpusim.matrices import LAYOUTS, far_apart, guarded, laid_out, rounded_to_tf32
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbuilder.ops import _cuda


def expand(S, B, bias, scaling, y=None, tf32=False, layout="plain"):
    """y, of whose memory nothing was known before; or the update added to ``y``."""
    out, check_around = guarded(len(S), len(B), S.dtype, layout)
    if y is not None:
        out.copy_(y)
    expand_into(out, S, B, bias, scaling, y is not None, tf32)
    check_around()
    return out


def expand_into(y, S, B, bias, scaling, accumulate=False, tf32=False):
    arguments = *map(_cuda._matrix, (S, B)), _cuda._address(bias), scaling, accumulate, _cuda._matrix(y)
    _cuda._kernels.lora_expand(_cuda._dtype(S), *arguments, tf32, 0, 0)


def formula(S, B, bias, scaling, y):
    update = scaling * (S @ B.t())
    return update + y if bias is None else update + bias + y


def inputs(M, N, r, dtype):
    """S, B and a bias: values of order one in and out."""
    return torch.randn(M, r).to(dtype), (torch.randn(N, r) / max(r, 1) ** 0.5).to(dtype), torch.randn(N).to(dtype)


@settings(deadline=None, max_examples=60)
@given(
    M=st.integers(1, 150),
    N=st.integers(1, 280) | st.sampled_from([63, 64, 128, 129]),
    r=st.integers(1, 40) | st.integers(41, 256) | st.sampled_from([8, 16, 32, 64, 256]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    tf32=st.booleans(),
    base=st.sampled_from(["nothing", "bias", "y"]),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
    schedule=st.integers(0, 3),
    seed=st.integers(0, 2**32),
)
def test_errs_no_more_than_torch(emulator, check_error, M, N, r, dtype, tf32, base, layouts, schedule, seed):
    torch.manual_seed(seed)
    if dtype == torch.float32 and not tf32:
        M, N, r = min(M, 70), min(N, 140), min(r, 40)  # FMA is slow to emulate
    found, same, exact = [], [], []
    emulator.schedule(schedule)
    for _ in range(max(1, 64 // (M * N))):  # small results: the largest error of a few numbers is chance
        S, B, bias = inputs(M, N, r, dtype)
        bias = laid_out(bias[None], layouts[2])[0] if base == "bias" else None
        y = torch.randn(M, N).to(dtype) if base == "y" else None
        with emulator.serving():
            views = laid_out(S, layouts[0]), laid_out(B, layouts[1])
            found.append(expand(*views, bias, 1.25, y, tf32, layouts[3]))
        y = torch.zeros(M, N, dtype=dtype) if y is None else y
        operands = [rounded_to_tf32(t) for t in (S, B)] if tf32 and dtype == torch.float32 else (S, B)
        same.append(formula(*operands, bias, 1.25, y))
        exact.append(formula(S.double(), B.double(), None if bias is None else bias.double(), 1.25, y.double()))
    emulator.schedule(0)
    check_error(found, same, exact)


def test_with_b_zero_the_base_stays_to_the_bit(cuda):
    S, B, bias = inputs(50, 90, 12, torch.bfloat16)
    assert torch.equal(expand(S, B * 0, bias, 2.0), bias.expand(50, 90))
    y = torch.randn(50, 90).bfloat16()
    assert torch.equal(expand(S, B * 0, None, 2.0, y), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_schedule_gives_the_same_bits(cuda, dtype):
    S, B, bias = inputs(70, 140, 20, dtype)
    results = []
    for seed in range(8):
        cuda.schedule(seed)
        results.append(expand(S, B, bias, 0.5))
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("dtype, N", [(torch.bfloat16, 280), (torch.bfloat16, 63), (torch.float16, 128)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_y_is_written_once(cuda, dtype, N, accumulate):
    S, B, _ = inputs(150, N, 16, dtype)
    y = torch.randn(150, N).to(dtype)
    with cuda.recording(S=S, B=B) as launches:
        expand(S, B, None, 1.0, y if accumulate else None)
    (launch,) = launches
    (of_y,) = [traffic for name, traffic in launch.traffic.items() if name not in ("S", "B")]
    read = y.nbytes if accumulate else 0
    assert (of_y.bytes_written, of_y.unique_written, of_y.bytes_read, of_y.unique_read) == (
        y.nbytes,
        y.nbytes,
        read,
        read,
    )
    # a warp of 32 x 64 asks for its rows of S and B; the block's other warps find them in the cache
    assert launch.traffic["S"].bytes_read == S.nbytes * -(-N // 128) * 2
    assert launch.traffic["B"].bytes_read == B.nbytes * -(-150 // 128) * 4
    assert launch.traffic["S"].unique_read == S.nbytes and launch.traffic["B"].unique_read == B.nbytes


@pytest.mark.parametrize("N", [64, 63])
def test_rows_beyond_four_billion_elements(cuda, N):
    S, B, bias = inputs(140, N, 8, torch.bfloat16)
    far_S, far_B, far_y = (far_apart(*shape, S.dtype) for shape in ((140, 8), (N, 8), (140, N)))
    expand_into(far_y, far_S.copy_(S), far_B.copy_(B), bias, 0.5)
    assert torch.equal(far_y, expand(S, B, bias, 0.5))


@pytest.mark.parametrize("M, N, r", [(0, 8, 4), (5, 0, 4), (5, 9, 0)])
def test_empty_matrices(cuda, M, N, r):
    S, B, bias = inputs(M, N, r, torch.bfloat16)
    assert torch.equal(expand(S, B, bias, 1.5), bias.expand(M, N))


def test_what_it_refuses(cuda):
    S, B, bias = inputs(6, 10, 4, torch.float32)
    y = poisoned(6, 10)
    address = y.data_ptr()

    def call(**change):
        arguments = {"S": _cuda._matrix(S), "B": _cuda._matrix(B), "bias": 0, "scaling": 1.0, "accumulate": False}
        arguments |= {"y": _cuda._matrix(y), **change}
        _cuda._kernels.lora_expand(_cuda._dtype(S), *arguments.values(), False, 0, 0)

    with cuda.recording() as launches:
        for change, words in [
            ({"S": (address, 6, 5, 5)}, r"lora_expand: S is \[6, 5\], expected \[6, 4\]"),
            ({"y": (address, 6, 9, 9)}, r"lora_expand: y is \[6, 9\], expected \[6, 10\]"),
            ({"y": (address, 6, 10, 9)}, "y: rows of 10 columns that are 9 apart overlap"),
            ({"B": (0, 10, 4, 4)}, "lora_expand: B is null"),
            ({"accumulate": True, "bias": bias.data_ptr()}, "there is no bias where the update is added to y"),
        ]:
            with pytest.raises(ValueError, match=words):
                call(**change)
        huge = (1, 2**40, 4, 4), (1, 2**40, 10, 10)
        with pytest.raises(ValueError, match="lora_expand: too large for one launch, 8589934592 blocks"):
            call(S=huge[0], y=huge[1])
    assert not launches
    call()
