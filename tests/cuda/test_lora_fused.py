"""lora_fused and lora_fused_grad in CUDA, emulated: against fp64; mask, banks, traffic, and what they refuse."""

import pytest
import torch
from gpusim.harness import poisoned
from gpusim.matrices import LAYOUTS, far_apart, guarded, laid_out, rounded_to_tf32
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbuilder.ops import _cuda, reference

SEED = torch.tensor(0x123456789ABCDEF)
NARROW = [torch.bfloat16, torch.float16, torch.float32]


def fused(x, W, bias, S, B, scaling, tf32=False, layout="plain"):
    """y, of whose memory nothing was known before and around which nothing was written."""
    y, check_around = guarded(len(x), len(W), x.dtype, layout)
    fused_into(y, x, W, bias, S, B, scaling, tf32)
    check_around()
    return y


def fused_into(y, x, W, bias, S, B, scaling, tf32=False):
    arguments = *map(_cuda._matrix, (x, W)), _cuda._address(bias), *map(_cuda._matrix, (S, B)), scaling
    _cuda._kernels.lora_fused(_cuda._dtype(x), *arguments, _cuda._matrix(y), tf32, 0, 0)


def fused_grad(dY, W, dS, A, threshold=0, seed=SEED, stream=0, tf32=False, layout="plain"):
    """dX, likewise."""
    dX, check_around = guarded(len(dY), W.shape[1], dY.dtype, layout)
    fused_grad_into(dX, dY, W, dS, A, threshold, seed, stream, tf32)
    check_around()
    return dX


def fused_grad_into(dX, dY, W, dS, A, threshold=0, seed=SEED, stream=0, tf32=False):
    arguments = *map(_cuda._matrix, (dY, W, dS, A)), _cuda._mask(seed, stream, threshold), _cuda._matrix(dX)
    _cuda._kernels.lora_fused_grad(_cuda._dtype(dY), *arguments, tf32, 0, 0)


def scaled(rows, columns, depth, dtype):
    return (torch.randn(rows, columns) / max(depth, 1) ** 0.5).to(dtype)


def yardstick(exact, same, dtype, tf32):
    """torch's products in fp32 differ by a factor of two among themselves, by how they order their sums."""
    return exact + 2 * (same - exact) if dtype == torch.float32 and not tf32 else same


CASES = {
    "M": st.integers(1, 140),
    "N": st.integers(1, 140) | st.sampled_from([63, 64, 128, 129]),
    "K": st.integers(1, 140) | st.sampled_from([63, 64, 128, 129]),
    "r": st.integers(1, 70) | st.sampled_from([8, 16, 32, 256]),
    "dtype": st.sampled_from(NARROW),
    "tf32": st.booleans(),
    "layouts": st.tuples(*[st.sampled_from(LAYOUTS)] * 6),
    "schedule": st.integers(0, 3),
    "seed": st.integers(0, 2**32),
}


@settings(deadline=None, max_examples=40)
@given(with_bias=st.booleans(), **CASES)
def test_forward_errs_no_more_than_torch(
    emulator, check_error, M, N, K, r, dtype, tf32, layouts, schedule, seed, with_bias
):
    torch.manual_seed(seed)
    tf32 &= dtype == torch.float32
    found, same, exact = [], [], []
    emulator.schedule(schedule)
    for _ in range(max(1, 64 // (M * N))):  # small results: the largest error of a few numbers is chance
        matrices = [scaled(M, K, 1, dtype), scaled(N, K, K, dtype), scaled(M, r, 1, dtype), scaled(N, r, r, dtype)]
        bias = torch.randn(N).to(dtype) if with_bias else torch.zeros(N, dtype=dtype)
        with emulator.serving():
            x, W, S, B = map(laid_out, matrices, layouts)
            y = fused(x, W, laid_out(bias[None], layouts[4])[0] if with_bias else None, S, B, 1.25, tf32, layouts[5])

        def formula(x, W, S, B, bias=bias):
            return torch.nn.functional.linear(x, W, bias.to(x.dtype)) + 1.25 * (S @ B.t())

        found.append(y)
        exact.append(formula(*(t.double() for t in matrices)))
        plain = formula(*(map(rounded_to_tf32, matrices) if tf32 else matrices))
        same.append(yardstick(exact[-1], plain, dtype, tf32))
    emulator.schedule(0)
    check_error(found, same, exact, dtype=dtype)


@settings(deadline=None, max_examples=30)
@given(threshold=st.sampled_from([0, 6554, 32768, 60000]), **CASES)
def test_gradient_errs_no_more_than_torch(
    emulator, check_error, M, N, K, r, dtype, tf32, layouts, schedule, seed, threshold
):
    torch.manual_seed(seed)
    tf32 &= dtype == torch.float32
    found, same, exact = [], [], []
    emulator.schedule(schedule)
    for _ in range(max(1, 64 // (M * K))):
        matrices = [scaled(M, N, 1, dtype), scaled(N, K, N, dtype), scaled(M, r, 1, dtype), scaled(r, K, r, dtype)]
        key, stream = torch.randint(-(2**63), 2**63 - 1, ()), int(torch.randint(2**32, ()))
        with emulator.serving():
            dY, W, dS, A = map(laid_out, matrices, layouts)
            dX = fused_grad(dY, W, dS, A, threshold, key, stream, tf32, layouts[5])

        def formula(dY, W, dS, A, key=key, stream=stream):
            return dY @ W + reference.dropout(dS @ A, threshold, key, stream)

        found.append(dX)
        exact.append(formula(*(t.double() for t in matrices)))
        plain = formula(*(map(rounded_to_tf32, matrices) if tf32 else matrices))
        same.append(yardstick(exact[-1], plain, dtype, tf32))
    emulator.schedule(0)
    check_error(found, same, exact, dtype=dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("threshold, stream", [(16384, 0), (65535, 2**32 - 1), (1, 7)])
def test_the_gradients_mask_is_the_references_to_the_bit(cuda, dtype, threshold, stream):
    """No base and an update of ones: dX shows what was kept."""
    M, K, seed = 140, 200, torch.tensor(-(2**62) + 12345)
    ones = torch.ones(M, 1, dtype=dtype), torch.ones(1, K, dtype=dtype)
    dX = fused_grad(torch.zeros(M, 8, dtype=dtype), torch.zeros(8, K, dtype=dtype), *ones, threshold, seed, stream)
    keep = reference.keep_mask((M, K), threshold, seed, stream)
    scale = torch.tensor(65536 / (65536 - threshold), dtype=dtype)  # infinite in fp16 for the largest threshold
    assert torch.equal(dX, torch.where(keep, scale, 0))


@pytest.mark.parametrize("dtype", NARROW)
def test_with_b_zero_it_is_the_base(cuda, check_error, dtype):
    x, W, S, bias = (
        scaled(70, 90, 1, dtype),
        scaled(40, 90, 90, dtype),
        scaled(70, 8, 1, dtype),
        torch.randn(40).to(dtype),
    )
    y = fused(x, W, bias, S, torch.zeros(40, 8, dtype=dtype), 2.0)
    assert torch.equal(y, fused(x, W, bias, S * 0, torch.ones(40, 8, dtype=dtype), 2.0))
    exact, same = (torch.nn.functional.linear(x.to(d), W.to(d), bias.to(d)) for d in (torch.float64, dtype))
    check_error(y, yardstick(exact, same, dtype, False), exact)


@pytest.mark.parametrize("dtype, tf32", [(torch.bfloat16, False), (torch.float32, True), (torch.float32, False)])
def test_every_schedule_gives_the_same_bits_without_bank_conflicts(cuda, dtype, tf32):
    M, N, K, r = 140, 136, 104, 24
    x, W, S, B = scaled(M, K, 1, dtype), scaled(N, K, K, dtype), scaled(M, r, 1, dtype), scaled(N, r, r, dtype)
    dY, dS, A = scaled(M, N, 1, dtype), scaled(M, r, 1, dtype), scaled(r, K, r, dtype)
    forward, backward = [], []
    with cuda.recording() as launches:
        for seed in range(6):
            cuda.schedule(seed)
            forward.append(fused(x, W, None, S, B, 0.5, tf32))
            backward.append(fused_grad(dY, W, dS, A, 9000, tf32=tf32))
    assert all(torch.equal(y, forward[0]) for y in forward)
    assert all(torch.equal(dX, backward[0]) for dX in backward)
    assert all(launch.ldmatrix_conflicts == 0 for launch in launches)


@pytest.mark.parametrize("dtype, N", [(torch.bfloat16, 136), (torch.float32, 136), (torch.bfloat16, 63)])
@pytest.mark.parametrize("backward", [False, True])
def test_the_result_is_written_once_and_operands_read_once_a_block(cuda, dtype, N, backward):
    M, depth, r = 140, 104, 24
    left, right, skinny, adapter = (
        scaled(*shape, 1, dtype) for shape in ((M, depth), (depth, N) if backward else (N, depth), (M, r), (r, N))
    )
    with cuda.recording(left=left, right=right, skinny=skinny, adapter=adapter) as launches:
        if backward:
            result = fused_grad(left, right, skinny, adapter, 9000)
        else:
            result = fused(left, right, None, skinny, adapter.t().contiguous(), 0.5)
    (launch,) = launches
    across, down = -(-N // 128), -(-M // 128)
    for name, tensor, times in (("left", left, across), ("skinny", skinny, across), ("right", right, down)):
        traffic = launch.traffic[name]
        assert (traffic.unique_read, traffic.bytes_read) == (tensor.nbytes, tensor.nbytes * times)
    (written,) = [traffic for traffic in launch.traffic.values() if traffic.bytes_written]
    assert (written.bytes_written, written.unique_written, written.bytes_read) == (result.nbytes, result.nbytes, 0)


@pytest.mark.parametrize("columns", [64, 63])
def test_rows_beyond_four_billion_elements(cuda, columns):
    x, W, S, B = (torch.randn(shape).bfloat16() for shape in ((140, columns), (72, columns), (140, 8), (72, 8)))
    far = [far_apart(*t.shape, t.dtype).copy_(t) for t in (x, W, S, B)]
    far_y = far_apart(140, 72, x.dtype)
    fused_into(far_y, far[0], far[1], None, far[2], far[3], 0.5)
    assert torch.equal(far_y, fused(x, W, None, S, B, 0.5))
    dY, A = torch.randn(140, 72).bfloat16(), torch.randn(8, columns).bfloat16()
    far_dX = far_apart(140, columns, x.dtype)
    fused_grad_into(far_dX, far_y.copy_(dY), far[1], far[2], far_apart(8, columns, x.dtype).copy_(A), 5000)
    assert torch.equal(far_dX, fused_grad(dY, W, S, A, 5000))


@pytest.mark.parametrize("M, N, K", [(0, 8, 8), (5, 0, 8), (5, 8, 0)])
def test_empty_matrices(cuda, M, N, K):
    x, W, S, B = (torch.ones(shape).bfloat16() for shape in ((M, K), (N, K), (M, 4), (N, 4)))
    assert torch.equal(fused(x, W, None, S, B, 0.5), torch.full((M, N), K + 2).bfloat16())
    dX = fused_grad(torch.ones(M, N).bfloat16(), W, S, torch.ones(4, K).bfloat16())
    assert torch.equal(dX, torch.full((M, K), N + 4).bfloat16())


def test_what_they_refuse(cuda):
    x, W, S, B, y = (torch.ones(shape) for shape in ((6, 12), (10, 12), (6, 4), (10, 4), (6, 10)))
    dX, A, address = poisoned(6, 12), torch.ones(4, 12), x.data_ptr()

    def forward(**change):
        arguments = {"x": _cuda._matrix(x), "W": _cuda._matrix(W), "bias": 0, "S": _cuda._matrix(S)}
        arguments |= {"B": _cuda._matrix(B), "scaling": 1.0, "y": _cuda._matrix(y), **change}
        _cuda._kernels.lora_fused(_cuda._dtype(x), *arguments.values(), False, 0, 0)

    def backward(**change):
        arguments = {"dY": _cuda._matrix(y), "W": _cuda._matrix(W), "dS": _cuda._matrix(S), "A": _cuda._matrix(A)}
        arguments |= {"mask": (0, 0, 0), "dX": _cuda._matrix(dX), **change}
        _cuda._kernels.lora_fused_grad(_cuda._dtype(x), *arguments.values(), False, 0, 0)

    with cuda.recording() as launches:
        for call, change, words in [
            (forward, {"W": (address, 10, 11, 11)}, r"lora_fused: W is \[10, 11\], expected \[10, 12\]"),
            (forward, {"B": (address, 10, 5, 5)}, r"lora_fused: B is \[10, 5\], expected \[10, 4\]"),
            (forward, {"y": (0, 6, 10, 10)}, "lora_fused: y is null"),
            (backward, {"A": (address, 4, 10, 10)}, r"lora_fused_grad: A is \[4, 10\], expected \[4, 12\]"),
            (backward, {"dX": (address, 6, 10, 10)}, r"lora_fused_grad: dX is \[6, 10\], expected \[6, 12\]"),
            (backward, {"mask": (0, 0, 9)}, "lora_fused_grad: the mask's seed is null"),
            (backward, {"dX": (address, 6, 12, 11)}, "dX: rows of 12 columns that are 11 apart overlap"),
        ]:
            with pytest.raises(ValueError, match=words):
                call(**change)
    assert not launches
    forward(), backward()
