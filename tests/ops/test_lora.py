"""The public LoRA operators against fp64 autograd of the formula, with the exported mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llmbuilder.ops import _gemm, dropout_mask, frozen_linear, lora_delta, lora_linear
from llmbuilder.ops.lora import _frozen_linear, _lora_linear, _lora_linear_backward

NARROW = [torch.float32, torch.bfloat16, torch.float16]


def formula(x, weight, bias, A, B, scaling, keep, p):
    """The formula in x's dtype, adapters cast to it: the truth in fp64, the yardstick in a narrow dtype."""
    threshold = int(65536 * p + 0.5)
    dropped = torch.where(keep, x * (65536 / (65536 - threshold)), 0)
    update = scaling * (dropped @ A.to(x.dtype).t()) @ B.to(x.dtype).t()
    return update if weight is None else F.linear(x, weight, bias) + update


def layer(M, K, N, r, dtype=torch.float32, adapter_dtype=None, lead=()):
    """x, weight, bias, A, B of one layer, values of order one in and out."""
    x = torch.randn(*lead, M, K).to(dtype)
    weight, bias = (torch.randn(N, K) / max(K, 1) ** 0.5).to(dtype), torch.randn(N).to(dtype)
    A, B = (torch.randn(r, K) / max(K, 1) ** 0.5), torch.randn(N, r) / max(r, 1) ** 0.5
    return x, weight, bias, A.to(adapter_dtype or dtype), B.to(adapter_dtype or dtype)


def gradients(function, x, A, B, dY):
    """y, dX, dA, dB of function(x, A, B)."""
    x, A, B = (t.detach().clone().requires_grad_() for t in (x, A, B))
    y = function(x, A, B)
    return [y.detach(), *torch.autograd.grad(y, (x, A, B), dY.to(y.dtype))]


@settings(deadline=None, max_examples=50)
@given(
    M=st.integers(0, 70),
    K=st.integers(1, 150),
    N=st.integers(1, 150),
    r=st.sampled_from([1, 3, 8, 16, 33, 64, 80]),
    p=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    dtype=st.sampled_from(NARROW),
    masters=st.booleans(),
    base=st.sampled_from(["weight", "weight and bias", "none"]),
    seed=st.integers(0, 2**32),
)
def test_result_and_gradients_err_no_more_than_torchs(check_error, M, K, N, r, p, dtype, masters, base, seed):
    torch.manual_seed(seed)
    samples = [one_layers_results(M, K, N, r, p, dtype, masters, base) for _ in range(16)]
    for i, name in enumerate(("y", "dX", "dA", "dB")):
        check_error(*([sample[way][i] for sample in samples] for way in range(3)), name, dtype)


def one_layers_results(M, K, N, r, p, dtype, masters, base):
    """y, dX, dA and dB three times: by the operator, by torch in the same dtype, and in fp64."""
    x, weight, bias, A, B = layer(M, K, N, r, dtype, torch.float32 if masters else None)
    weight, bias = (None if base == "none" else weight), (bias if base == "weight and bias" else None)
    dY, seed, scaling = torch.randn(M, N).to(dtype), torch.randint(2**62, ()), 1.5
    keep = dropout_mask(x.shape, p, seed, 5)

    def ours(x, A, B):
        if weight is None:
            return lora_delta(x, A, B, scaling, p, seed, 5)
        return lora_linear(x, weight, bias, A, B, scaling, p, seed, 5)

    def plain(x, A, B):
        w, b = (None if t is None else t.to(x.dtype) for t in (weight, bias))
        return formula(x, w, b, A, B, scaling, keep, p)

    found = gradients(ours, x, A, B, dY)
    assert [t.dtype for t in found] == [dtype, dtype, A.dtype, B.dtype]
    # The adapters as x's dtype holds them: their rounding is part of the definition.
    exact = gradients(plain, x.double(), A.to(dtype).double(), B.to(dtype).double(), dY)
    return found, gradients(plain, x, A, B, dY), exact


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("with_base", [True, False])
def test_gradcheck_in_fp64(p, with_base):
    x, weight, bias, A, B = layer(3, 5, 4, 2, torch.float64, lead=(2,))
    seed = torch.tensor(77)
    inputs = [t.requires_grad_() for t in ((x, weight, bias, A, B) if with_base else (x, A, B))]

    def function(*inputs):
        return (lora_linear if with_base else lora_delta)(*inputs, 0.7, p, seed, 2)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_in_fp64_it_is_the_formula(p):
    x, weight, bias, A, B = layer(7, 9, 6, 3, torch.float64, lead=(2, 4))
    keep = dropout_mask(x.shape, p, torch.tensor(3), 1)
    expected = formula(x, weight, bias, A, B, 2.0, keep, p)
    torch.testing.assert_close(lora_linear(x, weight, bias, A, B, 2.0, p, torch.tensor(3), 1), expected)
    torch.testing.assert_close(lora_delta(x, A, B, 2.0, p, torch.tensor(3), 1), expected - F.linear(x, weight, bias))


@pytest.mark.parametrize(
    "dtype, adapter_dtype",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_registered_as_torch_wants_it(backend, dtype, adapter_dtype):
    x, weight, bias, A, B = layer(6, 10, 8, 3, dtype, adapter_dtype, lead=(2,))
    for t in (x, A, B):
        t.requires_grad_()
    seed = torch.tensor(5)
    for base in ((weight, bias), (weight, None), (None, None)):
        torch.library.opcheck(_lora_linear, (x, *base, A, B, 0.5, 20000, seed, 1))
    torch.library.opcheck(_lora_linear, (x, weight, bias, A, B, 0.5, 0, None, 0))
    assert not _lora_linear(x, weight, bias, A, B, 0.5, 20000, seed, 1)[1].requires_grad
    y, S = _lora_linear(x.detach(), weight, bias, A.detach(), B.detach(), 0.5, 20000, seed, 1)
    for need_x in (True, False):
        arguments = (y, x.detach(), weight, S, A.detach(), B.detach(), 0.5, 20000, seed, 1, need_x)
        torch.library.opcheck(_lora_linear_backward, arguments)
    torch.library.opcheck(_frozen_linear, (x, weight, bias))


def view_like(x, layout):
    """The same values in memory that is not contiguous, or does not start where an allocation does."""
    if layout == "sliced":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "offset"])
@pytest.mark.parametrize("shape", [(33,), (5, 33), (2, 3, 33), (0, 33), (2, 0, 33), (1, 1, 33)])
def test_any_layout_and_leading_dimensions(backend, shape, layout):
    x, (_, weight, bias, A, B) = torch.randn(shape), layer(1, 33, 21, 5)
    dY, seed = torch.randn(*shape[:-1], 21), torch.tensor(11)

    def function(view):
        def call(x, A, B):
            return lora_linear(view(x), view(weight), bias, view(A), view(B), 1.5, 0.3, seed)

        return gradients(call, x, A, B, view(dY))

    for name, got, expected in zip(
        ("y", "dX", "dA", "dB"), function(lambda t: view_like(t, layout)), function(lambda t: t), strict=True
    ):
        torch.testing.assert_close(got, expected, msg=lambda text, name=name: f"{name}: {text}")
        # Our kernels copy what lies otherwise; a library's product may depend on where its operands lie.
        assert torch.equal(got, expected) or backend == "reference" or name in ("y", "dX")


def test_the_same_call_gives_the_same_bits(backend):
    x, _, _, A, B = layer(130, 96, 80, 16)
    dY, seed = torch.randn(130, 80), torch.tensor(11)
    before, results = torch.get_num_threads(), []
    try:
        # Our kernels cut their work by shape alone; plain torch's sums follow the number of threads.
        for threads in (1, 2, 3) if backend == "cpu" else (2, 2):
            torch.set_num_threads(threads)
            results.append(gradients(lambda x, A, B: lora_delta(x, A, B, 1.5, 0.3, seed), x, A, B, dY))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [2, 100])
def test_with_zero_lora_b_it_is_the_frozen_layer(dtype, rows):
    x, weight, bias, A, _ = layer(rows, 70, 90, 8, dtype)
    y = lora_linear(x, weight, bias, A, A.new_zeros(90, 8), 2.0, 0.1)
    assert torch.equal(y, frozen_linear(x, weight, bias))
    with torch.no_grad():
        assert torch.equal(lora_linear(x, weight, bias, A, A.new_zeros(90, 8), 2.0), frozen_linear(x, weight, bias))


def test_a_weight_that_trains_gets_its_gradient():
    x, weight, bias, A, B = layer(7, 9, 6, 3, torch.float64)
    inputs = [t.requires_grad_() for t in (weight, bias)]
    dY = torch.randn(7, 6, dtype=torch.float64)
    for function in (lambda: lora_linear(x, weight, bias, A, B, 1.0), lambda: frozen_linear(x, weight, bias)):
        dW, db = torch.autograd.grad(function(), inputs, dY)
        torch.testing.assert_close(dW, dY.t() @ x)
        torch.testing.assert_close(db, dY.sum(0))


def test_only_what_needs_a_gradient_gets_one(backend):
    x, weight, bias, A, B = layer(20, 9, 6, 3)
    dY = torch.randn(20, 6)
    A.requires_grad_(), B.requires_grad_()
    expected = torch.autograd.grad(lora_linear(x.clone().requires_grad_(), weight, bias, A, B, 1.0), (A, B), dY)
    found = torch.autograd.grad(lora_linear(x, weight, bias, A, B, 1.0), (A, B), dY)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    lora_linear(x, weight, bias, A.detach(), B, 1.0).backward(dY)
    assert x.grad is None and A.grad is None and torch.equal(B.grad, expected[1])


def test_no_product_for_an_x_that_needs_no_gradient(monkeypatch):
    x, weight, _, A, B = layer(20, 9, 6, 3)
    calls = []
    linear_grad = _gemm.linear_grad
    monkeypatch.setattr(_gemm, "linear_grad", lambda *a: calls.append(1) or linear_grad(*a))
    for x_needs in (False, True):
        y = lora_linear(x.requires_grad_(x_needs), weight, None, A.requires_grad_(), B, 1.0)
        assert not calls
        y.sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_x_once_the_shrunk_rows_and_the_seed_are_all_that_is_kept(backend, p):
    M, K, N, r = 50, 40, 30, 4
    x, weight, bias, A, B = layer(M, K, N, r)
    given_ = {t.data_ptr() for t in (x.requires_grad_(), weight, A.requires_grad_(), B.requires_grad_())}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(x, weight, bias, A, B, 1.0, p)
    own = sorted(t.numel() for t in kept if t.data_ptr() not in given_)
    assert own == ([1, M * r] if p else [M * r])


def stack(x, weight, bias, A, B):
    """A layer used twice, and its update once more, with dropout; each step depends on the last.

    Inductor may draw the seeds of independent calls in another order than eager execution; here it can't.
    """
    h = lora_linear(x, weight, bias, A, B, 1.5, 0.3).tanh()
    h = lora_linear(h, weight, bias, A, B, 1.5, 0.3)
    return h + lora_delta(h.tanh(), A, B, 0.5, 0.3)


def passes(function, inputs):
    torch.manual_seed(0)
    y = function(*inputs)
    return [y, *torch.autograd.grad(y.square().sum(), [t for t in inputs if t.requires_grad])]


@pytest.fixture
def square_layer():
    x, weight, bias, A, B = layer(12, 24, 24, 4, lead=(2,))
    return [x.requires_grad_(), weight, bias, A.requires_grad_(), B.requires_grad_()]


def recomputed(*inputs):
    return checkpoint(stack, *inputs, use_reentrant=False)


@pytest.mark.parametrize(
    "function",
    [recomputed, torch.compile(stack, fullgraph=True), torch.compile(recomputed, fullgraph=True)],
    ids=["checkpointed", "compiled", "both"],
)
def test_a_layer_used_twice_gives_equal_gradients_eager_and(function, square_layer):
    for got, expected in zip(passes(function, square_layer), passes(stack, square_layer), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_layer_used_twice_is_the_formula_twice(square_layer):
    x, weight, bias, A, B = [t.detach().double().requires_grad_(t.requires_grad) for t in square_layer]
    seeds = [torch.tensor(i) for i in range(3)]
    keeps = [dropout_mask(x.shape, 0.3, seed) for seed in seeds]

    def ours():
        h = lora_linear(x, weight, bias, A, B, 1.5, 0.3, seeds[0]).tanh()
        return lora_linear(h, weight, bias, A, B, 1.5, 0.3, seeds[1]) + lora_delta(x, A, B, 0.5, 0.3, seeds[2])

    def plain():
        h = formula(x, weight, bias, A, B, 1.5, keeps[0], 0.3).tanh()
        return formula(h, weight, bias, A, B, 1.5, keeps[1], 0.3) + formula(x, None, None, A, B, 0.5, keeps[2], 0.3)

    for got, expected in zip(*(torch.autograd.grad(f().square().sum(), (x, A, B)) for f in (ours, plain)), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_graph_that_is_kept_gives_the_same_gradients_again(backend, square_layer):
    x, weight, bias, A, B = square_layer
    y = lora_linear(x, weight, bias, A, B, 1.5, 0.3).sum()
    first = torch.autograd.grad(y, (x, A, B), retain_graph=True)
    second = torch.autograd.grad(y, (x, A, B))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("layer", ["lora", "frozen"])
def test_what_a_layer_returns_may_be_changed_in_place(layer):
    """As models do that add the output of one layer to another's."""
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(6, 8)
    A, B = torch.randn(2, 8), torch.randn(6, 2)
    y = lora_linear(x, weight, None, A, B, 0.5) if layer == "lora" else frozen_linear(x, weight)
    y.mul_(3.0)
    y.sum().backward()
    whole = weight + 0.5 * B @ A if layer == "lora" else weight
    torch.testing.assert_close(x.grad, 3 * whole.sum(0).expand(2, 3, 8))


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("masters", [torch.float32, torch.bfloat16])
def test_inference_without_gradients(backend, rows, masters):
    x, weight, bias, A, B = layer(rows, 70, 50, 8, torch.bfloat16, masters)
    expected = lora_linear(x, weight, bias, A.requires_grad_(), B, 1.5)
    with torch.no_grad():
        y, delta = lora_linear(x, weight, bias, A, B, 1.5), lora_delta(x, A, B, 1.5)
    assert not y.requires_grad and y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected.detach(), rtol=0.02, atol=0.03)
    torch.testing.assert_close(delta.float(), (y - F.linear(x, weight, bias)).float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_casts_as_linear_does(dtype):
    x, weight, bias, A, B = layer(30, 40, 50, 8, dtype)
    x.requires_grad_(), A.requires_grad_(), B.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        like = F.linear(x, weight, bias)
        y, frozen, delta = (
            lora_linear(x, weight, bias, A, B, 1.5),
            frozen_linear(x, weight, bias),
            lora_delta(x, A, B, 1.5),
        )
    assert y.dtype == frozen.dtype == delta.dtype == like.dtype
    assert torch.equal(frozen, like)
    by_hand = lora_linear(*(t.to(like.dtype) for t in (x, weight, bias)), A, B, 1.5)
    assert torch.equal(y, by_hand)
    y.float().sum().backward()
    assert (x.grad.dtype, A.grad.dtype, B.grad.dtype) == (dtype, dtype, dtype)


def test_a_backward_pass_under_autocast_stays_in_its_dtype(backend):
    x, weight, bias, A, B = layer(30, 40, 50, 8)
    dY = torch.randn(30, 50)
    inputs = [t.requires_grad_() for t in (x, A, B)]
    expected = torch.autograd.grad(lora_linear(x, weight, bias, A, B, 1.5), inputs, dY)
    y = lora_linear(x, weight, bias, A, B, 1.5)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, inputs, dY)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"lora_A": torch.ones(2, 4)}, r"lora_linear: expected x \[..., K\], lora_A \[r, K\] and lora_B \[N, r\], got"),
        ({"lora_B": torch.ones(5, 3)}, r"got \[7, 3\], \[2, 3\] and \[5, 3\]"),
        ({"lora_B": torch.ones(4, 2)}, "weight has 5 rows but lora_B 4"),
        ({"weight": torch.ones(5, 4)}, r"expected x \[..., K\] and weight \[N, K\], got \[7, 3\], \[5, 4\]"),
        ({"bias": torch.ones(4)}, r"bias must be \[5\] as weight has rows, got \[4\]"),
        ({"weight": torch.ones(5, 3).bfloat16()}, "weight is torch.bfloat16 on cpu, x is torch.float32 on cpu; cast"),
        ({"lora_A": torch.ones(2, 3, device="meta")}, "lora_A is on meta, x on cpu"),
        ({"lora_A": torch.ones(2, 3, dtype=torch.int32)}, "lora_A must be floating point, got torch.int32"),
        ({"x": torch.tensor(1.0)}, "expected x"),
        ({"p": 1.5}, r"lora_linear: p must lie in \[0, 1\)"),
        ({"p": 0.5, "seed": torch.tensor(1.5)}, "lora_linear: seed must be an int64 scalar tensor"),
    ],
)
def test_errors_say_what_was_wrong(change, words):
    good = {"x": torch.ones(7, 3), "weight": torch.ones(5, 3), "bias": None, "lora_A": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=words):
        lora_linear(**{**good, "lora_B": torch.ones(5, 2), "scaling": 1.0, **change})


def test_the_other_operators_check_too():
    with pytest.raises(ValueError, match="frozen_linear: expected x"):
        frozen_linear(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(ValueError, match="lora_delta: expected x"):
        lora_delta(torch.ones(2, 3), torch.ones(4, 5), torch.ones(3, 4), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_frozen_layer_and_its_gradient(dtype, check_error):
    x, weight, bias, _, _ = layer(90, 70, 80, 1, dtype, lead=(2,))
    dY = torch.randn(2, 90, 80).to(dtype)

    def results(layer, *tensors):
        x, weight, bias, dY = (t.clone() for t in tensors)
        y = layer(x.requires_grad_(), weight, bias)
        return y.detach(), torch.autograd.grad(y, x, dY)[0]

    wide = [t.double() for t in (x, weight, bias, dY)]
    for out, same, exact in zip(
        results(frozen_linear, x, weight, bias, dY),
        results(F.linear, x, weight, bias, dY),
        results(F.linear, *wide),
        strict=True,
    ):
        # oneDNN's fp32 product errs about twice as much as torch's default one: the rule's factor, once more.
        check_error(out, exact + 2 * (same - exact) if dtype == torch.float32 else same, exact)
