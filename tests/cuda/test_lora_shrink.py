"""lora_shrink in CUDA, emulated: S = drop(x) A^T against fp64, its mask, its traffic, and what it refuses."""

import pytest
import torch
from gpusim.harness import poisoned
from gpusim.matrices import LAYOUTS, far_apart, guarded, laid_out, rounded_to_tf32
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbuilder.ops import _cuda, reference

SEED = torch.tensor(0x123456789ABCDEF)


def shrink(x, A, threshold=0, seed=SEED, stream=0, tf32=False, layout="plain"):
    """S, of whose memory nothing was known before and around which nothing was written."""
    S, check_around = guarded(len(x), len(A), x.dtype, layout)
    shrink_into(S, x, A, threshold, seed, stream, tf32)
    check_around()
    return S


def shrink_into(S, x, A, threshold=0, seed=SEED, stream=0, tf32=False):
    workspace = poisoned(_cuda._kernels.lora_shrink_workspace(_cuda._dtype(x), *x.shape, len(A)) // 4)
    matrices, mask = map(_cuda._matrix, (x, A, S)), _cuda._mask(seed, stream, threshold)
    _cuda._kernels.lora_shrink(_cuda._dtype(x), *matrices, mask, tf32, workspace.data_ptr(), 0, 0)


def inputs(M, K, r, dtype):
    return torch.randn(M, K).to(dtype), (torch.randn(r, K) / max(K, 1) ** 0.5).to(dtype)


@settings(deadline=None, max_examples=60)
@given(
    M=st.integers(1, 150),
    K=st.integers(1, 260) | st.sampled_from([63, 64, 128]),
    r=st.integers(1, 40) | st.integers(41, 256) | st.sampled_from([8, 16, 32, 33, 64, 65, 256]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    threshold=st.sampled_from([0, 6554, 32768, 60000]),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    schedule=st.integers(0, 3),
    seed=st.integers(0, 2**32),
)
def test_errs_no_more_than_torch(emulator, check_error, M, K, r, dtype, threshold, layouts, schedule, seed):
    torch.manual_seed(seed)
    errs_no_more(emulator, check_error, M, K, r, dtype, threshold, layouts, schedule)


@settings(deadline=None, max_examples=30)
@given(
    M=st.integers(1, 70),
    K=st.integers(1, 150) | st.just(63),
    r=st.integers(1, 40),
    tf32=st.booleans(),
    threshold=st.sampled_from([0, 6554, 32768]),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    seed=st.integers(0, 2**32),
)
def test_errs_no_more_than_torch_in_fp32(emulator, check_error, M, K, r, tf32, threshold, layouts, seed):
    torch.manual_seed(seed)
    errs_no_more(emulator, check_error, M, K, r, torch.float32, threshold, layouts, 0, tf32)


def errs_no_more(emulator, check_error, M, K, r, dtype, threshold, layouts, schedule=0, tf32=False):
    found, same, exact = [], [], []
    for _ in range(max(1, 64 // (M * r))):  # small results: the largest error of a few numbers is chance
        x, A = inputs(M, K, r, dtype)
        seed, stream = torch.randint(-(2**63), 2**63 - 1, ()), int(torch.randint(2**32, ()))
        emulator.schedule(schedule)
        with emulator.serving():
            S = shrink(laid_out(x, layouts[0]), laid_out(A, layouts[1]), threshold, seed, stream, tf32, layouts[2])
        emulator.schedule(0)
        found.append(S)
        same.append(torch_product(x, A, threshold, seed, stream, tf32))
        exact.append(reference.lora_shrink(x.double(), A.double(), threshold, seed, stream))
    check_error(found, same, exact)


def torch_product(x, A, threshold, seed, stream, tf32=False):
    """The yardstick: torch's product in x's dtype, of operands in tf32 where those are allowed."""
    if tf32:
        x, A = rounded_to_tf32(x), rounded_to_tf32(A)
    return reference.lora_shrink(x, A, threshold, seed, stream)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("M, K", [(5, 4096), (70, 1500), (3, 1031)])
def test_a_depth_in_slices(cuda, check_error, dtype, M, K):
    x, A = inputs(M, K, 24, dtype)
    assert _cuda._kernels.lora_shrink_workspace(_cuda._dtype(x), M, K, 24) > 0
    with cuda.recording() as launches:
        S = shrink(x, A, 6554, stream=3)
    assert len(launches) == 2 and launches[0].grid[1] > 1
    exact = reference.lora_shrink(x.double(), A.double(), 6554, SEED, 3)
    check_error(S, reference.lora_shrink(x, A, 6554, SEED, 3), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("K, first", [(63, 0), (256, 0), (2048, 1000)])  # the last in slices
@pytest.mark.parametrize("threshold, stream", [(16384, 0), (65535, 2**32 - 1), (1, 7)])
def test_the_mask_is_the_references_to_the_bit(cuda, dtype, K, first, threshold, stream):
    """x = 1 times unit vectors: S shows what was kept of 32 columns."""
    x, A = torch.ones(67, K, dtype=dtype), torch.eye(32, K - first).to(dtype)
    A = torch.cat([torch.zeros(32, first, dtype=dtype), A], 1)
    seed = torch.tensor(-(2**62) + 12345)
    S = shrink(x, A, threshold, seed, stream)
    keep = reference.keep_mask((67, K), threshold, seed, stream)[:, first : first + 32]
    assert torch.equal(S, keep * torch.tensor(65536 / (65536 - threshold), dtype=torch.float32).to(dtype))


def test_what_is_dropped_counts_for_nothing_whatever_it_was(cuda):
    x, A = inputs(40, 96, 16, torch.bfloat16)
    keep = reference.keep_mask(x.shape, 20000, SEED, 1)
    spoilt = torch.where(keep, x, torch.tensor([torch.nan, torch.inf]).bfloat16()[torch.randint(2, x.shape)])
    assert torch.equal(shrink(spoilt, A, 20000, stream=1), shrink(x, A, 20000, stream=1))


@pytest.mark.parametrize("dtype, r", [(torch.bfloat16, 20), (torch.bfloat16, 50), (torch.float32, 20)])
def test_every_schedule_gives_the_same_bits(cuda, dtype, r):
    x, A = inputs(70, 1030 if dtype == torch.bfloat16 else 140, r, dtype)
    results = []
    for seed in range(8):
        cuda.schedule(seed)
        results.append(shrink(x, A, 9000))
    assert all(torch.equal(S, results[0]) for S in results)


@pytest.mark.parametrize("r", [16, 40, 200])
@pytest.mark.parametrize("dtype, K", [(torch.bfloat16, 200), (torch.bfloat16, 63), (torch.float16, 640)])
def test_x_is_read_once_and_s_written_once(cuda, dtype, K, r):
    x, A = inputs(150, K, r, dtype)
    with cuda.recording(x=x, A=A) as launches:
        S = shrink(x, A, 5000)
    traffic = launches[0].traffic
    block = 128 if r > 64 else 64  # rows
    assert traffic["x"].bytes_read == traffic["x"].unique_read == x.nbytes
    assert traffic["A"].unique_read == A.nbytes
    # each warp of 32 (16 above 32 ranks) rows of a block asks for A, and the block's other warps find it in the cache
    assert traffic["A"].bytes_read == A.nbytes * -(-len(x) // block) * block // (32 if r <= 32 else 16)
    assert len(launches) == 1
    written = [t for name, t in traffic.items() if name not in ("x", "A") and t.bytes_written]
    assert [(t.bytes_written, t.unique_written) for t in written] == [(S.nbytes, S.nbytes)]


@pytest.mark.parametrize("K", [64, 63])
def test_rows_beyond_four_billion_elements(cuda, K):
    x, A = inputs(70, K, 8, torch.bfloat16)
    far_x, far_S = far_apart(70, K, x.dtype), far_apart(70, 8, x.dtype)
    shrink_into(far_S, far_x.copy_(x), A, 5000)
    assert torch.equal(far_S, shrink(x, A, 5000))


def test_above_256_ranks_x_is_read_again(cuda, check_error):
    x, A = inputs(20, 64, 300, torch.bfloat16)
    with cuda.recording(x=x) as launches:
        S = shrink(x, A, 5000)
    assert launches[0].traffic["x"].bytes_read == 2 * x.nbytes
    exact = reference.lora_shrink(x.double(), A.double(), 5000, SEED, 0)
    check_error(S, reference.lora_shrink(x, A, 5000, SEED, 0), exact)


@pytest.mark.parametrize("M, K, r", [(0, 8, 4), (5, 0, 4)])
def test_empty_matrices(cuda, M, K, r):
    x, A = inputs(M, K, r, torch.bfloat16)
    assert torch.equal(shrink(x, A, 5000), torch.zeros(M, r, dtype=torch.bfloat16))


def test_what_it_refuses(cuda):
    x, A = inputs(600, 2048, 4, torch.bfloat16)
    S, workspace = poisoned(600, 4, dtype=torch.bfloat16), poisoned(600 * 4 * 64)
    address = x.data_ptr()

    def call(**change):
        arguments = {"x": _cuda._matrix(x), "A": _cuda._matrix(A), "S": _cuda._matrix(S), "mask": (0, 0, 0)}
        arguments |= {"tf32": False, "workspace": workspace.data_ptr(), **change}
        _cuda._kernels.lora_shrink(_cuda._dtype(x), *arguments.values(), 0, 0)

    with cuda.recording() as launches:
        for change, words in [
            ({"A": (address, 4, 2047, 2047)}, r"lora_shrink: A is \[4, 2047\], expected \[4, 2048\]"),
            ({"S": (address, 600, 5, 5)}, r"lora_shrink: S is \[600, 5\], expected \[600, 4\]"),
            ({"x": (address, 600, 2048, 2000)}, "x: rows of 2048 columns that are 2000 apart overlap"),
            ({"x": (0, 600, 2048, 2048)}, "lora_shrink: x is null"),
            ({"x": (address, -1, 2048, 2048)}, "negative size"),
            ({"mask": (0, 0, 65536)}, "threshold is 65536, must be below 65536"),
            ({"mask": (0, 0, 100)}, "lora_shrink: the mask's seed is null"),
            ({"workspace": 0}, "lora_shrink: the workspace is null"),
        ]:
            with pytest.raises(ValueError, match=words):
                call(**change)
    assert not launches
    call()
