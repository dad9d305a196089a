"""Every operator by every backend: the mask to the bit, results and gradients by the rule for errors.

The reference, the CPU's kernels and the CUDA kernels, emulated, take part in this process. Triton's, interpreted, need
one of their own, which runs this very file.
"""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from gpusim.matrices import LAYOUTS, laid_out
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from llmbuilder import ops
from llmbuilder.ops import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_TESTS = Path(__file__).parents[1] / "triton"
if INTERPRETED:
    sys.path.insert(0, str(TRITON_TESTS))
    import guard

    guard.install(int(os.environ.get("GUARD_SEED", "0")))

BACKENDS = ["triton"] if INTERPRETED else ["reference", "cpu", "cuda"]
NARROW = [torch.float32, torch.bfloat16, torch.float16]
PROBABILITIES = st.sampled_from([0.0, 1e-5, 0.1, 0.5, 0.97])
SEEDS, STREAMS = st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**32 - 1)
RANKS = st.integers(1, 33) | st.integers(34, 256) | st.sampled_from([8, 16, 64, 65, 256])
SIZES = st.integers(24, 100) | st.sampled_from([63, 64])  # the largest error of a few numbers is chance


def drawn(examples):
    """Interpreted programs are slow: fewer of them."""
    count = examples // 5 if INTERPRETED else examples
    return settings(deadline=None, max_examples=count, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def by(request):
    """by(backend, function, ...): what function returns when that backend serves all operators, from memory of NaN."""

    def call(backend, function, *arguments):
        serving = request.getfixturevalue("emulator").serving() if backend == "cuda" else nullcontext()
        with pytest.MonkeyPatch.context() as patch, serving:
            patch.setenv("LLMBUILDER_BACKEND", backend)
            torch.use_deterministic_algorithms(True)  # fills what it allocates
            try:
                return function(*arguments)
            finally:
                torch.use_deterministic_algorithms(False)

    return call


def reachable(*tensors):
    """Within, interpreted programs may follow addresses to these tensors."""
    return guard.allow(*tensors) if INTERPRETED else nullcontext()


def as_products_may_err(same, exact):
    """Torch's result where it errs twice as much in fp32: the library's product may be oneDNN's, which does."""
    return exact + 2 * (same - exact) if same.dtype == torch.float32 else same


def threshold_of(p):
    return int(65536 * p + 0.5)


@drawn(40)
@given(
    lead=st.lists(st.integers(0, 9), max_size=2),
    columns=st.integers(1, 100),
    p=PROBABILITIES,
    seed=SEEDS,
    stream=STREAMS,
    dtype=st.sampled_from(NARROW),
)
@example(lead=[5], columns=63, p=0.1, seed=-1, stream=2**32 - 1, dtype=torch.bfloat16)
def test_dropout_has_the_same_bits(by, lead, columns, p, seed, stream, dtype):
    x, dY, seed = torch.randn(*lead, columns).to(dtype), torch.randn(*lead, columns).to(dtype), torch.tensor(seed)
    keep = reference.keep_mask(x.shape, threshold_of(p), seed, stream) if threshold_of(p) else torch.ones_like(x) > 0
    expected = [torch.where(keep, t * (65536 / (65536 - threshold_of(p))), 0) for t in (x, dY)]

    def dropout():
        leaf = x.clone().requires_grad_()
        y = ops.dropout(leaf, p, seed, stream)
        return ops.dropout_mask(x.shape, p, seed, stream), y.detach(), *torch.autograd.grad(y, leaf, dY)

    for backend in BACKENDS:
        found = by(backend, dropout)
        for name, got, right in zip(("mask", "y", "dX"), found, (keep, *expected), strict=True):
            assert torch.equal(got, right), f"{name} by {backend}"


def layer(M, K, N, r, dtype):
    """x, weight, bias, A, B, dY of values of order one; the adapters are fp32 masters."""
    x, weight, bias, dY = torch.randn(M, K), torch.randn(N, K) / K**0.5, torch.randn(N), torch.randn(M, N)
    A, B = torch.randn(r, K) / K**0.5, torch.randn(N, r) / r**0.5
    return *(t.to(dtype) for t in (x, weight, bias)), A, B, dY.to(dtype)


def gradients(function, x, A, B, dY):
    """y, dX, dA, dB; x keeps its strides."""
    x, A, B = (t.detach().requires_grad_() for t in (x, A, B))
    y = function(x, A, B)
    return [y.detach(), *torch.autograd.grad(y, (x, A, B), dY.to(y.dtype))]


@drawn(30)
@given(
    M=SIZES,
    K=SIZES,
    N=SIZES,
    r=RANKS,
    p=PROBABILITIES,
    dtype=st.sampled_from(NARROW),
    base=st.sampled_from(["weight", "weight and bias", "none"]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**32),
    stream=STREAMS,
)
@example(M=33, K=63, N=63, r=5, p=0.1, dtype=torch.bfloat16, base="weight", layout="plain", seed=0, stream=1)
@example(M=40, K=63, N=72, r=256, p=0.0, dtype=torch.float16, base="none", layout="slice", seed=0, stream=1)
def test_a_lora_layer_and_its_gradients(by, check_error, M, K, N, r, p, dtype, base, layout, seed, stream):
    torch.manual_seed(seed)
    ways = {way: [] for way in (*BACKENDS, "torch", "exact")}
    for _ in range(1 + min(11, 1000 // (min(M, r) * min(N, K)))):
        x, weight, bias, A, B, dY = layer(M, K, N, r, dtype)
        weight, bias = None if base == "none" else weight, bias if base == "weight and bias" else None
        mask = p, torch.randint(-(2**63), 2**63 - 1, ()), stream
        keep, scale = reference.keep_mask(x.shape, threshold_of(p), *mask[1:]), 65536 / (65536 - threshold_of(p))

        def public(x, A, B, weight=weight, bias=bias, mask=mask):
            if weight is None:
                return ops.lora_delta(x, A, B, 1.5, *mask)
            return ops.lora_linear(x, weight, bias, A, B, 1.5, *mask)

        def plain(x, A, B, weight=weight, bias=bias, keep=keep, scale=scale):
            dropped = torch.where(keep, x * scale, 0)
            update = 1.5 * (dropped @ A.to(x.dtype).t()) @ B.to(x.dtype).t()
            return update + (
                0 if weight is None else F.linear(x, *(None if t is None else t.to(x.dtype) for t in (weight, bias)))
            )

        for backend in BACKENDS:
            ways[backend].append(by(backend, gradients, public, laid_out(x, layout), A, B, laid_out(dY, layout)))
        ways["torch"].append(gradients(plain, x, A, B, dY))
        ways["exact"].append(gradients(plain, x.double(), A.to(dtype).double(), B.to(dtype).double(), dY))
    for i, name in enumerate(("y", "dX", "dA", "dB")):
        exact, same = ([draw[i] for draw in ways[way]] for way in ("exact", "torch"))
        if base != "none" and name in ("y", "dX"):
            same = [as_products_may_err(*pair) for pair in zip(same, exact, strict=True)]
        for backend in BACKENDS:
            check_error([draw[i] for draw in ways[backend]], same, exact, f"{name} by {backend}", dtype)


@drawn(30)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    dtype=st.sampled_from(NARROW),
    weighted=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_ewc(by, check_error, sizes, dtype, weighted, seed):
    torch.manual_seed(seed)
    ways = {way: [] for way in (*BACKENDS, "torch", "exact")}
    for _ in range(8):
        params, grads = ([torch.randn(size).to(dtype) for size in sizes] for _ in range(2))
        anchors, fishers = [p + torch.randn_like(p) / 4 for p in params], [torch.rand(s).to(dtype) for s in sizes]

        def public(params=params, anchors=anchors, fishers=fishers, grads=grads):
            leaves, sums = [p.clone() for p in params], [f.clone() for f in fishers]
            for leaf, grad in zip(leaves, grads, strict=True):
                leaf.grad = grad.clone()
            with reachable(*leaves, *(leaf.grad for leaf in leaves), *anchors, *fishers, *sums, *grads):
                value = ops.ewc_penalty_(leaves, anchors, fishers if weighted else None, 0.6)
                ops.ewc_accumulate_(sums, grads, 0.3)
            return value, [leaf.grad for leaf in leaves], sums

        def plain(dtype, params=params, anchors=anchors, fishers=fishers, grads=grads):
            tensors = [[t.to(dtype) for t in group] for group in (params, anchors, fishers, grads)]
            rows = [(p - a, f if weighted else torch.ones_like(f), f, g) for p, a, f, g in zip(*tensors, strict=True)]
            value = 0.3 * sum((f * d * d).sum() for d, f, _, _ in rows)
            return value, [g + 0.6 * f * d for d, f, _, g in rows], [f + 0.3 * g * g for _, _, f, g in rows]

        for backend in BACKENDS:
            ways[backend].append(by(backend, public))
        ways["torch"].append(plain(dtype))
        ways["exact"].append(plain(torch.float64))
    for backend in BACKENDS:
        for (value, *_), (exact, *_) in zip(ways[backend], ways["exact"], strict=True):
            assert value.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-12), backend
        for part, name in ((1, "gradient"), (2, "Fisher")):
            for i in range(len(sizes)):
                results = ([draw[part][i] for draw in ways[way]] for way in (backend, "torch", "exact"))
                check_error(*results, f"{name} {i} by {backend}")


@drawn(20)
@given(
    rows=st.integers(24, 60),
    columns=st.integers(24, 300),
    width=SIZES,
    dtype=st.sampled_from(NARROW),
    softcap=st.sampled_from([None, 1.5, 30.0]),
    bias=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_linear_cross_entropy(by, check_error, rows, columns, width, dtype, softcap, bias, seed):
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, width).to(dtype), (torch.randn(columns, width) * 3 / width**0.5).to(dtype)
    b, targets, dL = (
        torch.randn(columns).to(dtype) if bias else None,
        torch.randint(columns, (rows,)),
        torch.randn(rows),
    )
    targets[::5] = -100

    def losses(x, weight, b):
        return ops.linear_cross_entropy(x, weight, targets, b, softcap, "none")

    def whole(x, weight, b):
        logits = F.linear(x, weight, b)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")

    def results(function, *inputs):
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        value = function(*leaves)
        return value.detach(), *torch.autograd.grad(value, [t for t in leaves if t is not None], dL.to(value.dtype))

    exact = results(whole, *(None if t is None else t.double() for t in (x, weight, b)))
    same = results(whole, x, weight, b)
    for backend in BACKENDS:
        found = by(backend, results, losses, x, weight, b)
        for name, got, torchs, right in zip(("losses", "dx", "dweight", "dbias"), found, same, exact, strict=False):
            check_error(got, as_products_may_err(torchs, right), right, f"{name} by {backend}", dtype)


@pytest.mark.skipif(INTERPRETED, reason="this is the other process")
def test_triton_interpreted():
    pytest.importorskip("triton")
    seed = int(torch.randint(2**31, ()))  # of the order of the programs
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "0", "GUARD_SEED": str(seed)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=5", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"GUARD_SEED={seed} {' '.join(command)}\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
