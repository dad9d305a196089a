"""linear_cross_entropy against torch's cross-entropy of whole logits, in fp64 and in the same dtype."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from llmbuilder.ops import _backend, _gemm, _native, cross_entropy, linear_cross_entropy, reference
from llmbuilder.ops.cross_entropy import score_tokens

REDUCTIONS = ["mean", "sum", "none"]
kernels = pytest.mark.skipif(not _native.available(), reason="the extension is not built")


def whole(x, weight, targets, bias=None, softcap=None, reduction="mean"):
    """The definition, with logits as large as they come."""
    logits = F.linear(x, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, targets.flatten(), reduction=reduction)
    return loss.reshape(targets.shape) if reduction == "none" else loss


def whole_at_both_precisions(inputs, incoming, **options):
    """Torch's own results with fp32 products as they are, and by the faster path that is still fp32."""
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            yield results(whole, inputs, incoming, **options)
    finally:
        torch.set_float32_matmul_precision(before)


def results(function, inputs, incoming, **options):
    """The value and the gradients of all floating inputs, for this incoming gradient."""
    inputs = [t.detach().requires_grad_(t.is_floating_point()) if t is not None else None for t in inputs]
    value = function(*inputs, **options)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, wanted, incoming.to(value.dtype))]


def problem(rows, vocabulary, width, dtype=torch.float32, bias=True, ignored=0.3):
    """x, weight, targets, bias with logits of some spread."""
    x, weight = torch.randn(rows, width, dtype=dtype), (torch.randn(vocabulary, width) * 3 / width**0.5).to(dtype)
    targets = torch.randint(vocabulary, (rows,))
    targets[torch.rand(rows) < ignored] = -100
    return x, weight, targets, torch.randn(vocabulary, dtype=dtype) if bias else None


def incoming_for(reduction, targets):
    return torch.randn(targets.shape) if reduction == "none" else torch.tensor(0.7)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(24, 90),  # an error is the largest of many: of one number it would be luck
    vocabulary=st.integers(24, 400),
    width=st.integers(8, 80),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 1.5, 30.0]),
    reduction=st.sampled_from(REDUCTIONS),
    chunk=st.sampled_from([7, 64]),
    seed=st.integers(0, 2**31),
)
def test_errs_as_little_as_torch(
    backend, check_error, rows, vocabulary, width, dtype, bias, softcap, reduction, chunk, seed
):
    torch.manual_seed(seed)
    inputs = problem(rows, vocabulary, width, dtype, bias)
    inputs[2][0] = 0
    double = [t.double() if t is not None and t.is_floating_point() else t for t in inputs]
    incoming, options = incoming_for(reduction, inputs[2]), {"softcap": softcap, "reduction": reduction}
    exact = results(whole, double, incoming, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "chunk_rows", lambda vocabulary, dtype: chunk)
        got = results(linear_cross_entropy, inputs, incoming, **options)
        losses = linear_cross_entropy(*inputs, softcap=softcap, reduction="none")
    if reduction != "none":  # the value is one number, whose error may be luck, but it is that of the losses
        sums = {"sum": torch.sum, "mean": lambda x: x.sum() / (inputs[2] >= 0).sum()}
        torch.testing.assert_close(got[0], sums[reduction](losses))
        got, exact = got[1:], exact[1:]
    torchs = [run[-len(got) :] for run in whole_at_both_precisions(inputs, incoming, **options)]
    for out, right, *same_dtype in zip(got, exact, *torchs, strict=True):
        worst = max(same_dtype, key=lambda t: float((t.double() - right).abs().max()))
        check_error(out, worst, right, f"{out.dtype} result")


@kernels
@pytest.mark.parametrize("isa", _native.isas() if _native.available() else [])
@pytest.mark.parametrize("columns", [1, 2, 15, 17, 63, 64, 1023, 1025, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_of_every_instruction_set_errs_as_little_as_torch(check_error, isa, columns, dtype):
    rows, before = max(64, 5_000 // columns), _native.isa()
    for softcap, weighted in ((0.0, False), (30.0, False), (0.0, True)):
        losses, gradients = ([], [], []), ([], [], [])  # of the kernel, of torch, exact; the largest error of one draw
        for _ in range(8):  # is chance
            logits, targets = (torch.randn(rows, columns) * 6).to(dtype), torch.randint(columns, (rows,))
            weights = torch.rand(rows) + 0.5 if weighted else None
            out, same, exact = logits.clone(), logits.clone(), logits.double()
            _native.set_isa(isa)
            try:
                loss, predictions = _native.softmax_cross_entropy_(out, targets, weights, softcap, True)
            finally:
                _native.set_isa(before)
            assert torch.equal(logits[range(rows), predictions], logits.amax(1)), "the prediction is a largest logit"
            torchs, right = (
                reference.softmax_cross_entropy_(t, targets, weights, softcap, True)[0] for t in (same, exact)
            )
            for lists, values in ((losses, (loss, torchs, right)), (gradients, (out, same, exact))):
                for kept, value in zip(lists, values, strict=True):
                    kept.append(value)
        check_error(*losses, "losses")
        check_error(*gradients, "gradient")


@kernels
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_the_kernels_bits_do_not_depend_on_the_number_of_threads(softcap):
    logits, targets = torch.randn(37, 3001), torch.randint(3001, (37,))
    threads, outcomes = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            out = logits.clone()
            outcomes.append((*_native.softmax_cross_entropy_(out, targets, None, softcap, True), out))
    finally:
        torch.set_num_threads(threads)
    for outcome in outcomes[1:]:
        assert all(map(torch.equal, outcomes[0], outcome))


def test_infinite_logits_and_nan_go_through_as_in_torch(backend):
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[-inf, 1, 2], [nan, 1, 2], [inf, 1, 2], [-inf] * 3, [3e38, -3e38, 0]])
    targets = torch.tensor([1, 1, 1, 1, 0])
    rows = logits.clone().requires_grad_()
    expected = F.cross_entropy(rows, targets, reduction="none")
    (grad,) = torch.autograd.grad(expected.sum(), rows)
    losses, _ = _backend.serve("softmax_cross_entropy_", logits)(logits, targets, None, 0.0, True)
    torch.testing.assert_close(losses, expected.detach(), equal_nan=True)
    torch.testing.assert_close(logits, grad, equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradient_in_fp64_is_that_of_the_value(reduction, softcap):
    x, weight, targets, bias = problem(5, 7, 4, torch.float64)
    targets[:2] = torch.tensor([3, -100])
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: linear_cross_entropy(x, weight, targets, bias, softcap, reduction), inputs
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_operators_pass_opcheck_with_gradients(dtype, with_bias):
    x, weight, targets, bias = problem(6, 9, 5, dtype, bias=with_bias)
    inputs = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in (x, weight, targets, bias)]
    needs = [True, True, with_bias]
    torch.library.opcheck(cross_entropy.linear_cross_entropy_sum, (*inputs, 0.0, -100, needs))
    torch.library.opcheck(cross_entropy.linear_cross_entropy_losses, (*inputs, 3.0, -100))
    detached = [t.detach() if t is not None else t for t in inputs]
    sums = torch.randn(6, dtype=dtype)
    torch.library.opcheck(cross_entropy.linear_cross_entropy_grads, (*detached, 3.0, -100, needs, sums))
    assert torch.equal(x.detach(), inputs[0]), "inputs are left alone"


def test_compiles_whole_and_under_activation_checkpointing():
    inputs, incoming = problem(13, 31, 8), torch.tensor(0.7)

    def loss(x, weight, targets, bias):
        return sum(
            linear_cross_entropy(x.sin(), weight, targets, bias, 4.0, reduction).square().sum()
            for reduction in REDUCTIONS
        )

    def recomputed(*inputs):
        return checkpoint(loss, *inputs, use_reentrant=False)

    eager = results(loss, inputs, incoming)
    torch._dynamo.reset()
    traced = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for function in (recomputed, traced, torch.compile(recomputed, fullgraph=True)):
        for out, expected in zip(results(function, inputs, incoming), eager, strict=True):
            torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_backward_and_a_second_use_add_up(reduction):
    inputs = problem(9, 12, 5)
    incoming = incoming_for(reduction, inputs[2])
    once = results(linear_cross_entropy, inputs, incoming, reduction=reduction)

    x, weight, bias = (inputs[i].clone().requires_grad_() for i in (0, 1, 3))
    loss = linear_cross_entropy(x, weight, inputs[2], bias, reduction=reduction)
    loss.backward(incoming, retain_graph=True)
    loss.backward(incoming)
    linear_cross_entropy(x, weight, inputs[2], bias, reduction=reduction).backward(incoming)
    for tensor, grad in zip((x, weight, bias), once[1:], strict=True):
        torch.testing.assert_close(tensor.grad, 3 * grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_shape_and_strides(backend, reduction):
    x, weight, targets, bias = problem(12, 21, 6)
    plain = results(linear_cross_entropy, (x, weight, targets, bias), incoming_for("sum", targets), reduction="sum")
    views = {
        "leading dimensions": (x.view(3, 4, 6), weight, targets.view(3, 4), bias),
        "transposed x": (x.t().contiguous().t(), weight, targets, bias),
        "transposed weight": (x, weight.t().contiguous().t(), targets, bias),
        "slices": (
            torch.cat([x, x], 1)[:, :6],
            torch.cat([weight, weight])[:21],
            targets,
            torch.cat([bias, bias])[::1][:21],
        ),
        "strided bias and targets": (x, weight, torch.stack([targets] * 2, 1)[:, 0], torch.stack([bias] * 2, 1)[:, 0]),
    }
    for name, view in views.items():
        value, *grads = results(
            linear_cross_entropy,
            view,
            torch.full(view[2].shape, 0.7) if reduction == "none" else torch.tensor(0.7),
            reduction=reduction,
        )
        scale = (targets >= 0).sum() if reduction == "mean" else 1
        torch.testing.assert_close(value.sum() * scale, plain[0], msg=lambda text, name=name: f"{name}: {text}")
        for grad, expected in zip(grads, plain[1:], strict=True):
            torch.testing.assert_close(
                grad.view_as(expected) * scale, expected, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("rows, vocabulary, width", [(1, 1, 1), (1, 300, 1), (2, 17, 3), (5, 1, 4), (3, 1025, 2)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_few_rows_columns_and_features(backend, rows, vocabulary, width, reduction):
    inputs = problem(rows, vocabulary, width, ignored=0)
    incoming = incoming_for(reduction, inputs[2])
    got = results(linear_cross_entropy, inputs, incoming, softcap=3.0, reduction=reduction)
    expected = results(whole, inputs, incoming, softcap=3.0, reduction=reduction)
    for out, right in zip(got, expected, strict=True):
        torch.testing.assert_close(out, right, rtol=1e-5, atol=1e-5)


def test_one_vector_has_one_loss():
    x, weight, _, bias = problem(1, 21, 6)
    target = torch.tensor(4)
    for reduction in REDUCTIONS:
        loss = linear_cross_entropy(x[0], weight, target, bias, reduction=reduction)
        torch.testing.assert_close(loss, whole(x, weight, target[None], bias, reduction="sum"))


@pytest.mark.parametrize("rows, ignored", [(0, 0.0), (5, 1.1)])
def test_no_target_at_all_is_as_in_torch(backend, rows, ignored):
    inputs = problem(rows, 11, 4, ignored=ignored)
    for reduction in REDUCTIONS:
        incoming = incoming_for(reduction, inputs[2])
        value, *grads = results(linear_cross_entropy, inputs, incoming, reduction=reduction)
        expected, *expected_grads = results(whole, inputs, incoming, reduction=reduction)
        assert torch.equal(value.nan_to_num(-1), expected.nan_to_num(-1)), reduction
        for grad, right in zip(grads, expected_grads, strict=True):
            assert torch.equal(grad, right) and not grad.any(), reduction


def test_the_ignored_index_is_free_to_choose():
    x, weight, targets, bias = problem(20, 11, 4)
    targets = targets.clamp(min=0)
    expected = F.cross_entropy(F.linear(x, weight, bias), targets, ignore_index=3)
    torch.testing.assert_close(linear_cross_entropy(x, weight, targets, bias, ignore_index=3), expected)


def test_ignored_positions_are_never_computed(monkeypatch):
    x, weight, targets, bias = problem(50, 11, 4, ignored=0.6)
    seen, linear = [], _gemm.linear
    monkeypatch.setattr(_gemm, "linear", lambda x, *rest: seen.append(len(x)) or linear(x, *rest))
    linear_cross_entropy(x, weight, targets, bias)
    assert sum(seen) == int((targets >= 0).sum())


def test_the_kernel_turns_logits_into_gradients_only_when_one_is_needed(monkeypatch):
    asked, serve = [], _backend.serve
    monkeypatch.setattr(_backend, "serve", lambda *args: lambda *chunk: asked.append(chunk[-1]) or serve(*args)(*chunk))
    x, weight, targets, bias = problem(6, 9, 5, ignored=0)
    score_tokens(x, weight, targets, bias)
    linear_cross_entropy(x, weight, targets, bias)
    linear_cross_entropy(x.requires_grad_(), weight, targets, bias)
    assert asked == [False, False, True]


def test_only_the_gradients_that_are_needed_are_computed(monkeypatch):
    computed, sweep = [], cross_entropy._sweep
    monkeypatch.setattr(cross_entropy, "_sweep", lambda *args: computed.append(list(args[6])) or sweep(*args))
    x, weight, targets, bias = problem(6, 9, 5)
    for frozen in ([x], [weight, bias], [x, weight, bias]):
        for t in (x, weight, bias):
            t.requires_grad_(all(t is not f for f in frozen))
        linear_cross_entropy(x, weight, targets, bias)
        assert computed.pop() == [t.requires_grad for t in (x, weight, bias)]
    x.requires_grad_()
    with torch.no_grad():
        linear_cross_entropy(x, weight, targets, bias)
    assert computed.pop() == [False, False, False]
    linear_cross_entropy(x, weight, targets, bias, reduction="none").sum().backward()
    assert computed == [[False, False, False], [True, False, False]]


class Largest(TorchDispatchMode):
    """The largest number of elements of any result inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return result


def test_whole_logits_are_never_in_memory(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 2000 * 16)
    x, weight, targets, _ = problem(400, 2000, 8, bias=False)
    with Largest() as swept:
        cross_entropy._sweep(x, weight, targets, None, 0.0, -100, (True, True, False))
    assert swept.elements == 16 * 2000, "a chunk of 16 rows of logits is the largest thing there is"

    saved = []
    x.requires_grad_()
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t),
        Largest() as public,
    ):
        for reduction in REDUCTIONS:
            linear_cross_entropy(x, weight, targets, reduction=reduction).sum().backward()
    assert max(public.elements, *saved) == weight.numel()


@pytest.mark.parametrize("vocabulary", [1, 50_000, 256_000, 2**26])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_takes_some_tens_of_megabytes(vocabulary, dtype):
    rows = cross_entropy.chunk_rows(vocabulary, dtype)
    size = rows * vocabulary * dtype.itemsize
    assert rows == 1 or size <= 2**26
    assert rows == cross_entropy.MAX_CHUNK_ROWS or rows == 1 or size > 2**25


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast_multiplies_in_its_dtype_and_sums_in_fp32(reduction):
    inputs = problem(30, 50, 16)
    incoming = incoming_for(reduction, inputs[2])
    with torch.autocast("cpu", torch.bfloat16):
        got = results(linear_cross_entropy, inputs, incoming, reduction=reduction)
        expected = results(whole, inputs, incoming, reduction=reduction)
    low = [t.bfloat16() if t.is_floating_point() else t for t in inputs]
    by_hand = results(linear_cross_entropy, low, incoming, reduction=reduction)
    assert torch.equal(got[0], by_hand[0]) and got[0].dtype == torch.float32
    torch.testing.assert_close(got[0], expected[0])
    for grad, right, low_grad in zip(got[1:], expected[1:], by_hand[1:], strict=True):
        assert grad.dtype == torch.float32 and torch.equal(grad, low_grad.float())
        assert (grad - right).norm() < 2**-7 * right.norm()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_scores_are_the_losses_and_the_most_likely_tokens(backend, softcap):
    x, weight, targets, bias = problem(40, 33, 6)
    losses, predictions = score_tokens(x.view(4, 10, 6), weight, targets.view(4, 10), bias, softcap)
    kept = targets >= 0
    expected = linear_cross_entropy(x, weight, targets, bias, softcap, "none").view(4, 10)
    assert torch.equal(losses, expected)
    assert torch.equal(predictions.flatten()[kept], F.linear(x, weight, bias).argmax(1)[kept])
    assert (predictions.flatten()[~kept] == -1).all()


def test_of_equal_logits_the_first_is_predicted(backend):
    weight = torch.zeros(5000, 2)
    weight[[4, 4097], 0] = 1
    _, predictions = score_tokens(torch.eye(2), weight, torch.zeros(2, dtype=torch.int64))
    assert predictions.tolist() == [4, 0]


@pytest.mark.parametrize("wrong", [-1, 11, 2**40])
def test_a_target_outside_the_vocabulary_is_named(wrong):
    x, weight, targets, _ = problem(8, 11, 4)
    targets[3] = wrong
    for reduction in REDUCTIONS:
        with pytest.raises(IndexError, match=f"target {wrong} is outside the 11 rows"):
            linear_cross_entropy(x, weight, targets, reduction=reduction)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(8, 5)}, "must share K, got \\[8, 5\\] and \\[11, 4\\]"),
        ({"x": torch.tensor(1.0)}, "must share K"),
        ({"weight": torch.ones(11, 4, 1)}, "must share K"),
        ({"targets": torch.zeros(7, dtype=torch.int64)}, "targets must be int64 of shape \\[8\\]"),
        ({"targets": torch.zeros(8)}, "targets must be int64"),
        ({"bias": torch.ones(4)}, "bias must have shape \\[11\\]"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"softcap": -3.0}, "softcap must be positive"),
        ({"reduction": "avg"}, "reduction must be 'mean', 'sum' or 'none', got 'avg'"),
        ({"weight": torch.ones(11, 4).bfloat16()}, "must share a floating dtype"),
        ({"x": torch.ones(8, 4).long(), "weight": torch.ones(11, 4).long()}, "must share a floating dtype"),
        ({"weight": torch.ones(11, 4, device="meta")}, "all tensors must be on x's device"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    x, weight, targets, _ = problem(8, 11, 4, bias=False)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**({"x": x, "weight": weight, "targets": targets} | change))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_row_weights_are_factors_of_the_losses(backend, reduction):
    inputs, factors = problem(40, 17, 8), torch.rand(40) * 3
    incoming = incoming_for(reduction, inputs[2])

    def weighted(*inputs):
        losses = whole(*inputs, reduction="none") * factors
        kept = inputs[2] != -100
        return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / factors[kept].sum()}[reduction]

    found = results(linear_cross_entropy, inputs, incoming, reduction=reduction, row_weights=factors)
    for one, other in zip(found, results(weighted, inputs, incoming), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_row_weights_of_one_change_no_bit(dtype, reduction):
    inputs = problem(300, 501, 24, dtype)
    incoming = incoming_for(reduction, inputs[2])
    plain = results(linear_cross_entropy, inputs, incoming, reduction=reduction)
    ones = results(linear_cross_entropy, inputs, incoming, reduction=reduction, row_weights=torch.ones(300))
    assert all(torch.equal(one, other) for one, other in zip(plain, ones, strict=True))


@pytest.mark.parametrize("factors", [torch.ones(3), torch.ones(4, dtype=torch.bfloat16)])
def test_row_weights_that_do_not_fit_are_named(factors):
    x, weight, targets, _ = problem(4, 5, 6)
    with pytest.raises(ValueError, match=r"row_weights must be torch.float32 of shape \[4\]"):
        linear_cross_entropy(x, weight, targets, row_weights=factors)
