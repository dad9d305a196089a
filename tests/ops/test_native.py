"""The compiled kernels of every instruction set, against fp64 and an implementation of the mask in numpy.

Error rule: max|out - ref64| <= 2 * max|torch in the same dtype - ref64| + one ulp of max|ref64|. Both maxima are taken
over several draws where outputs are small, since one lucky element of torch's would decide otherwise.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmbuilder.ops import _native

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.why_not())

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = _native.isas() if _native.available() else []
GUARD = 67  # elements around a buffer; odd, so that nothing is aligned


@pytest.fixture(autouse=True)
def default_isa():
    """Tests may change the instruction set and the number of threads."""
    isa, threads = _native.isa(), torch.get_num_threads()
    yield
    _native.set_isa(isa)
    torch.set_num_threads(threads)


@pytest.fixture(params=ISAS)
def isa(request):
    _native.set_isa(request.param)
    return request.param


# ---- independent truth ----------------------------------------------------------------------------------------------


def philox(counters: np.ndarray, key: int, rounds: int = 7) -> np.ndarray:
    """Philox4x32 as in the paper's figure: counters [..., 4] to words [..., 4]."""
    c0, c1, c2, c3 = (counters[..., i].astype(np.uint64) for i in range(4))
    k0, k1, low = key & 0xFFFFFFFF, key >> 32, np.uint64(0xFFFFFFFF)
    for _ in range(rounds):
        product0, product1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            product1 & low,
            (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            product0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], -1)


def keep_rows(rows: np.ndarray, columns: np.ndarray, threshold: int, seed: int, stream: int) -> Tensor:
    """The mask of these rows and columns, one by one."""
    row, column = np.meshgrid(rows, columns, indexing="ij")
    counter = np.stack([column // 8, row, np.full_like(row, stream), np.zeros_like(row)], -1)
    words = philox(counter, seed % 2**64)
    slices = words[..., np.arange(8) // 2] >> (16 * (np.arange(8, dtype=np.uint64) % 2)) & 0xFFFF
    return torch.from_numpy(np.take_along_axis(slices, column[..., None] % 8, -1)[..., 0] >= threshold)


def keep_mask(rows: int, columns: int, threshold: int, seed: int, stream: int) -> Tensor:
    return keep_rows(np.arange(rows), np.arange(columns), threshold, seed, stream)


class Errors:
    """Collects errors of outputs over draws and applies the error rule."""

    def __init__(self) -> None:
        self.worst: dict[str, list[float]] = {}

    def add(self, name: str, out: Tensor, exact: Tensor, rival: Tensor) -> None:
        if exact.numel() == 0:
            return
        entry = self.worst.setdefault(name, [0.0, 0.0, 0.0])
        found = (
            (out.double() - exact).abs().max().item(),
            (rival.double() - exact).abs().max().item(),
            exact.abs().max().item() * torch.finfo(out.dtype).eps,
        )
        entry[:] = [b if math.isnan(b) else max(a, b) for a, b in zip(entry, found, strict=True)]

    def check(self) -> None:
        for name, (error, rival, ulp) in self.worst.items():
            assert error <= 2 * rival + ulp, f"{name}: error {error:.3g}, torch's {rival:.3g}, one ulp {ulp:.3g}"


# Signalling NaN: what reads it is poisoned, and even adding zero to it changes its bits.
GUARDS = {
    torch.float32: (torch.int32, 0x7FA00000),
    torch.bfloat16: (torch.int16, 0x7FA0),
    torch.float16: (torch.int16, 0x7D00),
}


class Buffer:
    """A contiguous tensor amid guards that no kernel may read or write."""

    def __init__(self, value: Tensor) -> None:
        integer, pattern = GUARDS[value.dtype]
        self.flat = torch.full((value.numel() + 2 * GUARD,), pattern, dtype=integer)
        self.tensor = self.flat.view(value.dtype)[GUARD : GUARD + value.numel()].view(value.shape)
        self.tensor.copy_(value)
        self.pattern = pattern

    @classmethod
    def poisoned(cls, *shape: int, dtype: torch.dtype) -> "Buffer":
        return cls(torch.full(shape, math.nan, dtype=dtype))

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()

    def intact(self) -> bool:
        return bool((self.flat[:GUARD] == self.pattern).all() and (self.flat[-GUARD:] == self.pattern).all())


# ---- the mask -------------------------------------------------------------------------------------------------------

# Random123's known-answer table (kat_vectors), philox4x32 with 7 rounds: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
]
# The published mask: seed 0x0123456789abcdef, stream 7, threshold 19661 (p = 0.3), rows 0 to 3 of 40 columns; column 0
# is the highest bit. It never changes: a run must repeat on another machine and with another release.
PUBLISHED = ["ca7bd6fefd", "f91df7b67f", "aafaf9e3d7", "ccca6bfd79"]


def words_of(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(isa, counter, key, words):
    low, high = words_of(key)
    counters = np.array([words_of(counter)] * 19, np.uint32)
    out = np.zeros_like(counters)
    _native._C.philox(counters.ctypes.data, out.ctypes.data, len(counters), low | high << 32)
    assert out.tolist() == [words_of(words)] * 19
    assert philox(counters, low | high << 32).tolist() == out.tolist()  # the tests' own implementation too


def test_the_mask_reads_the_published_words_slice_by_slice(isa):
    """Counter 0 under key 0 decides columns 0 to 7 of row 0: a column is kept up to a threshold equal to its slice."""
    slices = [half for word in words_of(KNOWN[0][2]) for half in (word & 0xFFFF, word >> 16)]
    seed = torch.tensor(0)
    for column, value in enumerate(slices):
        assert _native.dropout_mask((1, 8), value, seed, 0)[0, column]
        assert not _native.dropout_mask((1, 8), value + 1, seed, 0)[0, column]


def test_the_mask_equals_the_published_table(isa):
    keep = _native.dropout_mask((4, 40), 19661, torch.tensor(0x0123456789ABCDEF), 7)
    assert [f"{int(''.join(str(int(k)) for k in row), 2):010x}" for row in keep] == PUBLISHED


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 600),
    threshold=st.integers(0, 65535),
    seed=st.integers(-(2**63), 2**63 - 1),
    stream=st.integers(0, 2**32 - 1),
)
def test_the_mask_equals_numpys(isa, rows, columns, threshold, seed, stream):
    keep = _native.dropout_mask((rows, columns), threshold, torch.tensor(seed), stream)
    assert torch.equal(keep, keep_mask(rows, columns, threshold, seed, stream))


def test_rows_count_over_all_leading_dimensions(isa):
    seed = torch.tensor(5)
    assert torch.equal(_native.dropout_mask((3, 5, 7), 9000, seed, 1).flatten(0, 1), keep_mask(15, 7, 9000, 5, 1))
    assert torch.equal(_native.dropout_mask((9,), 9000, seed, 1), keep_mask(1, 9, 9000, 5, 1)[0])
    assert _native.dropout_mask((), 0, seed, 1).item() is True


def test_the_rate_is_the_thresholds(isa):
    n, threshold = 2**20, 6554
    kept = _native.dropout_mask((1024, 1024), threshold, torch.randint(2**62, ()), 0).double().mean().item()
    p = threshold / 65536
    assert abs(kept - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)


# ---- dropout --------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(0, 40),
    columns=st.integers(0, 600),
    threshold=st.integers(0, 65535),
    seed=st.integers(-(2**63), 2**63 - 1),
    stream=st.integers(0, 2**32 - 1),
)
def test_dropout_rounds_once(isa, dtype, rows, columns, threshold, seed, stream):
    x, y, key = (
        Buffer(torch.randn(rows, columns).to(dtype)),
        Buffer.poisoned(rows, columns, dtype=dtype),
        torch.tensor(seed),
    )
    _native._C.dropout(
        _native._DTYPES[dtype], x.address, y.address, rows, columns, key.data_ptr(), stream, threshold, 2
    )
    scale = torch.tensor(65536 / (65536 - threshold))
    keep = keep_mask(rows, columns, threshold, seed, stream)
    expected = torch.where(keep, (x.tensor.float() * scale).to(dtype), torch.zeros((), dtype=dtype))
    assert torch.equal(y.tensor, expected)
    assert x.intact() and y.intact()


@pytest.mark.parametrize("columns", [2048, 2050])
def test_a_tensor_larger_than_the_caches_is_dropped_as_its_rows_are(isa, columns):
    """Large aligned float tensors are written past the caches; each row's mask and rounding stay what they were."""
    rows, key = 2**22 // columns + 3, torch.tensor(5)
    x = torch.randn(rows, columns)
    keep = _native.dropout_mask((rows, columns), 9000, key, 1)
    y = _native.dropout(x, 9000, key, 1)
    assert torch.equal(y, torch.where(keep, x * torch.tensor(65536 / (65536 - 9000)), 0.0))
    beside = torch.empty(rows * columns + 1)[1:].view(rows, columns).copy_(x)  # not aligned: by ordinary stores
    _native._C.dropout(
        _native._DTYPES[x.dtype], beside.data_ptr(), beside.data_ptr(), rows, columns, key.data_ptr(), 1, 9000, 2
    )
    assert torch.equal(beside, y)


def test_what_is_dropped_is_zero_even_where_it_was_not_finite(isa):
    x = torch.full((4, 100), math.inf)
    x[::2] = math.nan
    y, seed = _native.dropout(x, 32768, torch.tensor(3), 0), torch.tensor(3)
    keep = _native.dropout_mask((4, 100), 32768, seed, 0)
    assert (y[~keep] == 0).all() and not y[keep].isfinite().any()


@pytest.mark.parametrize("threshold", [9000, 32768])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_values_are_converted_as_torch_does(isa, dtype, threshold):
    """All 65536 bit patterns: NaN stays NaN; rounding, infinities, subnormals and overflow are right."""
    x, seed = torch.arange(-32768, 32768).to(torch.int16).view(dtype), torch.tensor(11)
    y = _native.dropout(x, threshold, seed, 0)
    keep = _native.dropout_mask(x.shape, threshold, seed, 0)
    expected = torch.where(keep, (x.float() * torch.tensor(65536 / (65536 - threshold))).to(dtype), 0)
    assert torch.equal(y.isnan(), expected.isnan())
    different = (y != expected) & ~expected.isnan()
    if isa == "avx512_bf16" and dtype == torch.bfloat16:  # the processor's conversion takes subnormals for zero
        assert (expected[different].abs() <= torch.finfo(dtype).tiny).all() and (y[different] == 0).all()
    else:
        assert not different.any()


# ---- LoRA -----------------------------------------------------------------------------------------------------------


def lora_draw(
    errors: Errors, dtype: torch.dtype, M: int, N: int, K: int, r: int, threshold: int, scaling: float
) -> None:
    """One draw of random operands through all four kernels, on guarded buffers."""
    C, code = _native._C, _native._DTYPES[dtype]
    seed, stream = torch.randint(-(2**62), 2**62, ()), int(torch.randint(2**32, ()))
    key = (seed.data_ptr(), stream, threshold, 2)
    keep = keep_mask(M, K, threshold, int(seed), stream) * (65536 / (65536 - threshold))
    x, y, dY, dX = (Buffer(torch.randn(*shape).to(dtype)) for shape in ((M, K), (M, N), (M, N), (M, K)))
    A, B = Buffer((torch.randn(r, K) / max(K, 1) ** 0.5).to(dtype)), Buffer(torch.randn(N, r).to(dtype))
    S, dS = Buffer.poisoned(M, r, dtype=dtype), Buffer.poisoned(M, r, dtype=dtype)
    dA, dB = Buffer.poisoned(r, K, dtype=torch.float32), Buffer.poisoned(N, r, dtype=torch.float32)
    dA_alone = Buffer.poisoned(r, K, dtype=torch.float32)
    y0, dX0 = y.tensor.clone(), dX.tensor.clone()
    dropped64, dropped = x.tensor.double() * keep, (x.tensor.float() * keep.float()).to(dtype)

    C.lora_shrink(code, x.address, A.address, S.address, M, K, r, *key)
    errors.add("S", S.tensor, dropped64 @ A.tensor.double().T, dropped @ A.tensor.T)
    C.lora_expand(code, y.address, S.address, B.address, M, N, r, scaling, 2)
    errors.add(
        "y",
        y.tensor,
        y0.double() + scaling * (S.tensor.double() @ B.tensor.double().T),
        y0 + scaling * (S.tensor @ B.tensor.T),
    )
    C.lora_grad_sb(code, dY.address, S.address, B.address, dS.address, dB.address, M, N, r, scaling, 2)
    errors.add("dS", dS.tensor, scaling * (dY.tensor.double() @ B.tensor.double()), scaling * (dY.tensor @ B.tensor))
    errors.add(
        "dB",
        dB.tensor,
        scaling * (dY.tensor.double().T @ S.tensor.double()),
        scaling * (dY.tensor.float().T @ S.tensor.float()),
    )
    C.lora_grad_ax(code, x.address, dS.address, A.address, dA.address, dX.address, M, K, r, *key)
    errors.add(
        "dA", dA.tensor, dS.tensor.double().T @ dropped64, dS.tensor.float().T @ (x.tensor.float() * keep.float())
    )
    errors.add(
        "dX",
        dX.tensor,
        dX0.double() + keep * (dS.tensor.double() @ A.tensor.double()),
        dX0 + ((dS.tensor @ A.tensor) * keep).to(dtype),
    )
    C.lora_grad_ax(code, x.address, dS.address, A.address, dA_alone.address, 0, M, K, r, *key)
    assert torch.equal(dA_alone.tensor, dA.tensor), "dA depends on whether dX is asked for"
    assert all(buffer.intact() for buffer in (x, y, dY, dX, A, B, S, dS, dA, dB, dA_alone))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(DTYPES),
    M=st.integers(0, 200),
    N=st.integers(0, 300),
    K=st.integers(0, 300),
    r=st.integers(1, 70),
    threshold=st.sampled_from([0, 1, 6554, 32768, 60000]),
    scaling=st.sampled_from([0.5, 2.0, -1.25]),
)
def test_lora_kernels_obey_the_error_rule(isa, dtype, M, N, K, r, threshold, scaling):
    errors = Errors()
    smallest = max(1, min(M, N, K) * min(M, N, K, r))
    for _ in range(min(12, 1 + 600 // smallest)):
        lora_draw(errors, dtype, M, N, K, r, threshold, scaling)
    errors.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_kernels_add_the_partial_sums_of_many_row_parts(isa, dtype):
    errors = Errors()
    lora_draw(errors, dtype, M=2085, N=130, K=131, r=5, threshold=6554, scaling=2.0)
    errors.check()


# ---- EWC ------------------------------------------------------------------------------------------------------------

SIZES = [1, 0, 15, 33, 16384, 16385, 50001, 7]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_ewc_penalty_equals_the_formula_in_fp64(isa, dtype, weighted):
    strength = 0.37
    thetas, anchors, grads = ([Buffer(torch.randn(n).to(dtype)) for n in SIZES] for _ in range(3))
    fishers = [Buffer(torch.rand(n).to(dtype)) for n in SIZES]
    before = [g.tensor.clone() for g in grads]
    value = _native._C.ewc_penalty(
        _native._DTYPES[dtype],
        [b.address for b in thetas],
        [b.address for b in anchors],
        [b.address for b in fishers] if weighted else [],
        [b.address for b in grads],
        SIZES,
        strength,
        2,
    )
    exact, errors = 0.0, Errors()
    for theta, anchor, fisher, grad, old in zip(thetas, anchors, fishers, grads, before, strict=True):
        weight = fisher.tensor if weighted else torch.ones_like(fisher.tensor)
        distance = theta.tensor.double() - anchor.tensor.double()
        exact += strength / 2 * (weight.double() * distance**2).sum().item()
        errors.add(
            f"gradient of {len(old)}",
            grad.tensor,
            old.double() + strength * weight.double() * distance,
            old + strength * (weight * (theta.tensor - anchor.tensor)),
        )
    assert value == pytest.approx(exact, rel=1e-12)
    errors.check()
    assert all(b.intact() for b in (*thetas, *anchors, *fishers, *grads))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ewc_accumulate_equals_the_formula_in_fp64(isa, dtype):
    fishers, grads = [Buffer(torch.rand(n).to(dtype)) for n in SIZES], [Buffer(torch.randn(n).to(dtype)) for n in SIZES]
    before, errors = [f.tensor.clone() for f in fishers], Errors()
    _native.ewc_accumulate_([f.tensor for f in fishers], [g.tensor for g in grads], 0.25)
    for fisher, grad, old in zip(fishers, grads, before, strict=True):
        g = grad.tensor
        errors.add(f"{len(old)}", fisher.tensor, old.double() + 0.25 * g.double() ** 2, old + 0.25 * g**2)
    errors.check()
    assert all(b.intact() for b in (*fishers, *grads))


def test_no_tensors_give_no_penalty():
    assert _native.ewc_penalty_([], [], [], 1.0) == 0.0
    assert _native.ewc_accumulate_([], [], 1.0) is None


# ---- bits -----------------------------------------------------------------------------------------------------------


def everything(dtype: torch.dtype) -> list[Tensor]:
    """Results of every kernel on operands that are the same each time."""
    g = torch.Generator().manual_seed(3)
    M, N, K, r, seed = 1111, 200, 333, 16, torch.tensor(9)
    x, y, dX, A, B, dY = (
        (torch.randn(*shape, generator=g) / 8).to(dtype) for shape in ((M, K), (M, N), (M, K), (r, K), (N, r), (M, N))
    )
    S = _native.lora_shrink(x, A, 9000, seed, 2)
    _native.lora_expand_(y, S, B, 0.5)
    dS, dB = _native.lora_grad_sb(dY, S, B, 0.5)
    dA = _native.lora_grad_ax_(x, dS, A, 9000, seed, 2, dX)
    params = [torch.nn.Parameter(t) for t in (x, dY)]
    for param in params:
        param.grad = torch.ones_like(param)
    value = _native.ewc_penalty_(params, [x.sin(), dY.sin()], [x.square(), dY.square()], 1.5)
    fisher = dX.square()
    _native.ewc_accumulate_([fisher], [x], 0.5)
    dropped, mask = _native.dropout(x, 9000, seed, 2), _native.dropout_mask(x.shape, 9000, seed, 2)
    sums = torch.tensor(value, dtype=torch.float64)
    return [S, y, dS, dB, dA, dX, params[0].grad, params[1].grad, sums, fisher, dropped, mask]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_neither_on_the_run_nor_on_the_number_of_threads(isa, dtype):
    torch.set_num_threads(1)
    expected = everything(dtype)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        for result, before in zip(everything(dtype), expected, strict=True):
            assert torch.equal(result, before)


def test_calls_from_several_threads_at_once_do_not_disturb_each_other(isa):
    from concurrent.futures import ThreadPoolExecutor

    torch.set_num_threads(2)
    expected = everything(torch.float32)
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(everything, [torch.float32] * 8):
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


# ---- beyond 2**31 elements ------------------------------------------------------------------------------------------


def needs_gib(gib: int) -> None:
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    free = sum(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free memory, has {free:.0f}")


@pytest.mark.large
def test_dropout_beyond_2_to_31_elements():
    needs_gib(8)
    rows, columns, seed, threshold = 65541, 32776, torch.tensor(77), 9000
    x = torch.ones(rows, columns, dtype=torch.bfloat16)
    _native._C.dropout(  # in place, which saves memory
        _native._DTYPES[x.dtype], x.data_ptr(), x.data_ptr(), rows, columns, seed.data_ptr(), 3, threshold, 2
    )
    scale = torch.tensor(65536 / (65536 - threshold)).to(x.dtype)
    past = 2**31 // columns
    for first in (0, past - 1, rows - 3):
        which = np.arange(first, first + 3)
        keep = keep_rows(which, np.arange(columns), threshold, 77, 3)
        assert torch.equal(x[first : first + 3], keep * scale), f"rows from {first}"


@pytest.mark.large
def test_ewc_beyond_2_to_31_elements():
    """Parameters, anchors and Fisher values are one periodic buffer, read with three offsets."""
    needs_gib(12)
    period, n = 4096, 2**31 + 4096 * 3 + 17
    pattern = torch.rand(period).to(torch.bfloat16)
    buffer = pattern.repeat((n + 2) // period + 1)
    theta, anchor, fisher = torch.nn.Parameter(buffer[:n], requires_grad=False), buffer[1 : n + 1], buffer[2 : n + 2]
    theta.grad = torch.zeros(n, dtype=torch.bfloat16)
    value = _native.ewc_penalty_([theta], [anchor], [fisher], 2.0)
    wide = pattern.double().repeat(2)
    distance, weight = wide[:period] - wide[1 : period + 1], wide[2 : period + 2]
    terms = weight * distance**2
    # chunks are added one after another in double: 2**17 equal terms, each of 2**-53 at most
    assert value == pytest.approx((terms.sum() * (n // period) + terms[: n % period].sum()).item(), rel=2e-11)
    gradient = (2.0 * weight * distance).to(torch.bfloat16)
    for first in (0, 2**31 // period * period - period, n // period * period - period):
        assert torch.equal(theta.grad[first : first + period], gradient), f"gradient from {first}"
    assert torch.equal(theta.grad[-(n % period) :], gradient[: n % period])

    grad = theta.grad
    _native.ewc_accumulate_([grad], [fisher], 0.5)
    expected = (gradient.double() + 0.5 * weight**2).to(torch.bfloat16)
    assert torch.equal(grad[2**31 // period * period :][:period], expected)
    assert torch.equal(grad[-(n % period) :], expected[: n % period])


# ---- instruction sets, threads, linking -----------------------------------------------------------------------------


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.modules["llmbuilder"].__file__).parents[1]), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def test_the_variable_forces_an_instruction_set():
    name = ISAS[-1]  # not what it would choose by itself, unless there is no other
    done = python("from llmbuilder.ops import _native; print(_native.isa())", LLMBUILDER_ISA=name)
    assert done.stdout.strip() == name, done.stderr


def test_an_instruction_set_that_does_not_fit_is_an_error():
    done = python("import llmbuilder.ops", LLMBUILDER_ISA="sse9")
    assert done.returncode != 0
    assert "LLMBUILDER_ISA asks for the instruction set 'sse9'" in done.stderr and ISAS[-1] in done.stderr
    with pytest.raises(ValueError, match="sse9"):
        _native.set_isa("sse9")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_kernels_run_in_torchs_own_pool_of_threads():
    """No thread is started beyond those that torch's own operators started, and set_num_threads is obeyed."""
    done = python(
        """
import os, torch
from llmbuilder.ops import _native
threads = lambda: len(os.listdir("/proc/self/task"))
x, seed = torch.randn(1000, 1000), torch.tensor(1)
for n in (1, 3):
    torch.set_num_threads(n)
    before = threads()
    _native.dropout(x, 9000, seed, 0)
    ours = threads()
    torch.sin(x)
    print(ours - before, threads() - ours)
libraries = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libomp" in line}
print(len(libraries))
"""
    )
    assert done.stdout.split("\n")[:3] == ["0 0", "2 0", "1"], done.stdout + done.stderr


@pytest.mark.skipif(not (ROOT / "csrc").exists() or sys.platform != "linux", reason="reads objects of the source tree")
def test_objects_of_an_instruction_set_share_no_function_with_others(tmp_path):
    """A weak function would be merged over all objects, and the copy that stays may need a newer processor."""
    import shutil

    compiler, nm = shutil.which("c++"), shutil.which("nm")
    if not compiler or not nm:
        pytest.skip("needs a C++ compiler and nm")
    shared = {"table.cpp", "isa.cpp", "workspace.cpp"}
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        if source.name in shared:
            continue
        target = tmp_path / f"{source.stem}.o"
        # not optimised: every inline function that is used is emitted
        flags = ["-std=gnu++17", "-O0", "-fPIC", "-fopenmp", "-w", "-DLLMBUILDER_ISA=plain", f"-I{ROOT}/csrc/include"]
        subprocess.run([compiler, *flags, "-c", str(source), "-o", str(target)], check=True)
        symbols = subprocess.run([nm, "-C", str(target)], check=True, capture_output=True, text=True).stdout
        weak = [line for line in symbols.splitlines() if line[17:18] in "WVu" and "llmbuilder::plain::" not in line]
        assert not [line for line in weak if "DW.ref" not in line], source.name


def test_a_source_tree_without_the_extension_says_what_to_type():
    done = python(
        """
import sys
sys.modules["llmbuilder._C"] = None  # what an import finds when there is none
from llmbuilder.ops import _native
print(_native.available(), _native.why_not())
"""
    )
    assert done.stdout.startswith("False") and "pip install ." in done.stdout, done.stdout + done.stderr
