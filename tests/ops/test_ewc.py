"""The EWC penalty and the Fisher diagonal against their formulas in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbuilder.ops import ewc_accumulate_, ewc_penalty, ewc_penalty_
from llmbuilder.ops.ewc import _ewc_penalty

NARROW = [torch.float32, torch.bfloat16, torch.float16]


def weights(shapes, dtypes):
    """Params, anchors and fishers; the anchors near the params, as after a task."""
    params = [torch.randn(s).to(d) for s, d in zip(shapes, dtypes, strict=True)]
    anchors = [(p + torch.randn_like(p) / 4).to(p.dtype) for p in params]
    return params, anchors, [torch.rand(p.shape).to(p.dtype) for p in params]


def formula(params, anchors, fishers, strength):
    fishers = fishers or [torch.ones_like(p) for p in params]
    return strength / 2 * sum((f * (p - a) ** 2).sum() for p, a, f in zip(params, anchors, fishers, strict=True))


def gradients(params, anchors, fishers, strength):
    """Value and gradients of the formula, by autograd in the tensors' own dtype."""
    leaves = [p.detach().clone().requires_grad_() for p in params]
    value = formula(leaves, anchors, fishers, strength)
    return value.detach(), torch.autograd.grad(value, leaves)


def wide(tensors):
    return None if tensors is None else [t.double() for t in tensors]


@settings(deadline=None, max_examples=60)
@given(
    shapes=st.lists(st.lists(st.integers(0, 70), max_size=3), min_size=1, max_size=4),
    dtype=st.sampled_from(NARROW),
    with_fishers=st.booleans(),
    with_grads=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_value_and_gradient_of_the_penalty_in_place(check_error, shapes, dtype, with_fishers, with_grads, seed):
    torch.manual_seed(seed)
    draws = []
    for _ in range(8):
        params, anchors, fishers = weights(shapes, [dtype] * len(shapes))
        fishers = fishers if with_fishers else None
        before = [torch.randn(p.shape).to(dtype) if with_grads else torch.zeros_like(p) for p in params]
        for param, grad in zip(params, before, strict=True):
            param.grad = grad.clone() if with_grads else None
        value = ewc_penalty_(params, anchors, fishers, 0.6)
        _, same = gradients(params, anchors, fishers, 0.6)
        exact_value, exact = gradients(wide(params), wide(anchors), wide(fishers), 0.6)
        draws.append(
            [
                [param.grad for param in params],
                [b + s for b, s in zip(before, same, strict=True)],
                [b.double() + e for b, e in zip(before, exact, strict=True)],
            ]
        )
        assert value.item() == pytest.approx(exact_value.item(), rel=1e-5, abs=1e-12)
    for i in range(len(shapes)):
        check_error(*([draw[way][i] for draw in draws] for way in range(3)), f"gradient {i}")


def test_gradcheck_of_the_differentiable_penalty():
    params, anchors, fishers = weights([(3, 4), (5,), ()], [torch.float64] * 3)
    for p in params:
        p.requires_grad_()
    for f in (fishers, None):
        assert torch.autograd.gradcheck(lambda *params, f=f: ewc_penalty(params, anchors, f, 0.7), params)
        torch.testing.assert_close(ewc_penalty(params, anchors, f, 0.7), formula(params, anchors, f, 0.7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_both_penalties_agree(backend, dtype):
    if backend == "cpu" and dtype == torch.float64:
        dtype = torch.float16  # the kernels have no fp64
    params, anchors, fishers = weights([(70, 33), (129,)], [dtype] * 2)
    value = ewc_penalty([p.requires_grad_() for p in params], anchors, fishers, 1.3)
    grads = torch.autograd.grad(3 * value, params)
    assert ewc_penalty_(params, anchors, fishers, 3 * 1.3).item() == pytest.approx(3 * value.item(), rel=1e-5)
    for param, grad in zip(params, grads, strict=True):
        torch.testing.assert_close(param.grad, grad)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_params_of_several_dtypes_in_one_call():
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float32]
    params, anchors, fishers = weights([(9, 3), (70,), (4, 4), (1,)], dtypes)
    exact_value, exact = gradients(wide(params), wide(anchors), wide(fishers), 2.0)
    assert ewc_penalty_(params, anchors, fishers, 2.0).item() == pytest.approx(exact_value.item(), rel=1e-5)
    for param, expected in zip(params, exact, strict=True):
        torch.testing.assert_close(param.grad.double(), expected, rtol=0.01, atol=0.01)
        assert param.grad.dtype == param.dtype


def test_only_a_param_that_needs_a_gradient_gets_one_and_no_fisher_does():
    params, anchors, fishers = weights([(4,), (5,)], [torch.float32] * 2)
    params[0].requires_grad_()
    ewc_penalty(params, anchors, fishers, 2.0).backward()
    torch.testing.assert_close(params[0].grad, 2 * fishers[0] * (params[0].detach() - anchors[0]))
    assert params[1].grad is None and anchors[0].grad is None and fishers[0].grad is None


def test_registered_as_torch_wants_it():
    params, anchors, fishers = weights([(4, 3), (5,)], [torch.float32, torch.bfloat16])
    for p in params:
        p.requires_grad_()
    for f in (fishers, []):
        torch.library.opcheck(_ewc_penalty, (params, anchors, f, 0.7))


def test_compiled_in_one_graph():
    params, anchors, fishers = weights([(4, 3), (5,)], [torch.float32] * 2)
    for p in params:
        p.requires_grad_()

    def loss(params):
        return ewc_penalty(params, anchors, fishers, 0.7) * 2

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        torch.autograd.grad(compiled(params), params), torch.autograd.grad(loss(params), params), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_equal_bits_run_to_run_and_for_any_number_of_threads():
    before, results = torch.get_num_threads(), []
    params, anchors, fishers = weights([(300, 333), (70_001,)], [torch.float32] * 2)
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            for p in params:
                p.grad = None
            results.append((ewc_penalty_(params, anchors, fishers, 1.3), [p.grad for p in params]))
    finally:
        torch.set_num_threads(before)
    for value, grads in results[1:]:
        assert value == results[0][0]
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1], strict=True))


@settings(deadline=None, max_examples=40)
@given(
    shapes=st.lists(st.lists(st.integers(0, 70), max_size=3), min_size=1, max_size=4),
    dtype=st.sampled_from(NARROW),
    seed=st.integers(0, 2**32),
)
def test_fisher_grows_by_the_weighted_square(check_error, shapes, dtype, seed):
    torch.manual_seed(seed)
    draws = []
    for _ in range(8):
        grads, _, fishers = weights(shapes, [dtype] * len(shapes))
        same = [f + 0.3 * g * g for f, g in zip(fishers, grads, strict=True)]
        exact = [f.double() + 0.3 * g.double() ** 2 for f, g in zip(fishers, grads, strict=True)]
        ewc_accumulate_(fishers, grads, 0.3)
        draws.append([fishers, same, exact])
    for i in range(len(shapes)):
        check_error(*([draw[way][i] for draw in draws] for way in range(3)), f"fisher {i}")


def test_the_weight_of_a_square_is_one_unless_given(backend):
    fisher, grad = torch.rand(7), torch.randn(7)
    for weight, arguments in ((1.0, ()), (0.3, (0.3,))):
        grown = [fisher.clone()]
        ewc_accumulate_(grown, [grad.clone().requires_grad_()], *arguments)
        torch.testing.assert_close(grown[0], fisher + weight * grad**2)


def test_no_params_cost_nothing():
    assert ewc_penalty([], [], None, 1.0).item() == 0
    assert ewc_penalty_([], [], None, 1.0) == 0
    ewc_accumulate_([], [])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"anchors": []}, r"ewc_penalty_: anchors must have 2 tensors, as the first list, got 0"),
        ({"fishers": [torch.ones(2, 3)]}, "fishers must have 2 tensors, as the first list, got 1"),
        ({"anchors": [torch.ones(2, 3), torch.ones(5)]}, r"anchors\[1\] must be torch.float32 of shape \[4\] on cpu"),
        (
            {"fishers": [torch.ones(2, 3).double(), torch.ones(4)]},
            r"fishers\[0\] must be torch.float32 .*got torch.float64",
        ),
        ({"anchors": [torch.ones(2, 3, device="meta"), torch.ones(4)]}, r"anchors\[0\] must be .* on cpu.*on meta"),
        (
            {"anchors": [torch.ones(3, 2).t(), torch.ones(4)]},
            r"anchors must be contiguous, got shape \[2, 3\] with strides",
        ),
        ({"params": [torch.ones(2, 3), torch.ones(4, dtype=torch.int64)]}, "tensor 1 of the first list is torch.int64"),
    ],
)
def test_errors_say_what_was_wrong_and_touch_nothing(change, words):
    good = {name: [torch.ones(2, 3), torch.ones(4)] for name in ("params", "anchors", "fishers")}
    arguments = {**good, **change}
    with pytest.raises(ValueError, match=words):
        ewc_penalty_(**arguments, strength=1.0)
    assert all(p.grad is None for p in arguments["params"])


def test_a_gradient_that_is_not_contiguous_is_refused():
    param = torch.ones(2, 3)
    param.grad = torch.ones(3, 2).t()
    with pytest.raises(ValueError, match="the gradients of params must be contiguous"):
        ewc_penalty_([param], [torch.ones(2, 3)], None, 1.0)


def test_a_tensor_given_twice_is_refused():
    param, fisher = torch.randn(3, requires_grad=True), torch.zeros(3)
    with pytest.raises(ValueError, match="ewc_penalty_: the same tensor stands twice"):
        ewc_penalty_([param, param], [torch.zeros(3)] * 2, None, 1.0)
    assert param.grad is None
    with pytest.raises(ValueError, match="ewc_accumulate_: the same tensor stands twice"):
        ewc_accumulate_([fisher, fisher], [torch.ones(3)] * 2)
    assert not fisher.any()


def test_a_fisher_unlike_its_gradient_is_refused():
    with pytest.raises(ValueError, match=r"ewc_accumulate_: grads\[0\] must be torch.float32 of shape \[3\] on cpu"):
        ewc_accumulate_([torch.ones(3)], [torch.ones(3).bfloat16()])
