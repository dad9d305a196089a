"""EWC in CUDA, emulated: value and gradient against fp64, two launches for any number of tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbuilder import ops
from llmbuilder.ops import _cuda, reference

NARROW = [torch.float32, torch.bfloat16, torch.float16]


GROUPS = ["theta", "anchor", "F", "grad"]


def make(sizes, dtype, misaligned=None):
    """Params with gradients, anchors and fishers; one of the groups begins an element after an allocation."""

    def tensors(name, draw):
        drawn = [draw(size).to(dtype) for size in sizes]
        return [torch.cat([t.new_zeros(1), t])[1:] for t in drawn] if name == misaligned else drawn

    draws = torch.randn, torch.randn, torch.rand, torch.randn
    params, anchors, fishers, grads = (tensors(name, draw) for name, draw in zip(GROUPS, draws, strict=True))
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params, anchors, fishers


def penalty(operator, params, anchors, fishers, strength, dtype=None):
    """Value and gradients by an operator on copies, in ``dtype``."""
    copies = [param.to(dtype or param.dtype, copy=True) for param in params]
    for copy, param in zip(copies, params, strict=True):
        copy.grad = param.grad.to(copy.dtype, copy=True)
    others = [None if group is None else [t.to(dtype or t.dtype) for t in group] for group in (anchors, fishers)]
    value = operator(copies, *others, strength)
    return float(value), [copy.grad for copy in copies]


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 7, 8, 9, 1000, 2048, 16383, 16384, 16385, 40000]), min_size=1, max_size=5),
    dtype=st.sampled_from(NARROW),
    weighted=st.booleans(),
    misaligned=st.sampled_from([None, *GROUPS]),
)
def test_the_penalty_and_its_gradient_err_no_more_than_torchs(
    emulator, check_error, sizes, dtype, weighted, misaligned
):
    found, same, exact = [], [], []
    for _ in range(4):
        params, anchors, fishers = make(sizes, dtype, misaligned)
        fishers = fishers if weighted else None
        strength = float(torch.rand(()))
        exact.append(penalty(reference.ewc_penalty_, params, anchors, fishers, strength, torch.float64))
        same.append(penalty(reference.ewc_penalty_, params, anchors, fishers, strength))
        with emulator.serving():
            value = _cuda.ewc_penalty_(params, anchors, fishers, strength)
        found.append((float(value), [param.grad for param in params]))
    for i in range(len(sizes)):
        check_error(*([draw[1][i] for draw in way] for way in (found, same, exact)), f"gradient {i}")
    check_error(*([torch.tensor(draw[0]) for draw in way] for way in (found, same, exact)), "value")


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 7, 8, 9, 2049, 16384, 16385]), min_size=1, max_size=4),
    dtype=st.sampled_from(NARROW),
    misaligned=st.sampled_from([None, "F", "theta"]),
)
def test_squares_are_accumulated(emulator, check_error, sizes, dtype, misaligned):
    ways = [[], [], []]
    for _ in range(4):
        grads, _, fishers = make(sizes, dtype, misaligned)  # theta stands for the gradients
        for way, wide in ((1, dtype), (2, torch.float64)):
            expected = [fisher.to(wide, copy=True) for fisher in fishers]
            reference.ewc_accumulate_(expected, [grad.to(wide) for grad in grads], 0.7)
            ways[way].append(expected)
        with emulator.serving():
            _cuda.ewc_accumulate_(fishers, grads, 0.7)
        ways[0].append(fishers)
    for i in range(len(sizes)):
        check_error(*([draw[i] for draw in way] for way in ways), f"fisher {i}")


def test_through_the_public_operators_with_several_dtypes_and_no_gradient_yet(cuda):
    params = [torch.randn(5, 7), torch.randn(40).bfloat16(), torch.randn(3, 1)]
    anchors = [torch.zeros_like(param) for param in params]
    value = ops.ewc_penalty_(params, anchors, None, 2.0)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(sum(float(param.double().square().sum()) for param in params), rel=1e-6)
    for param in params:
        assert torch.equal(param.grad, (2 * param.float()).to(param.dtype))
    ops.ewc_accumulate_(anchors, params)
    for param, fisher in zip(params, anchors, strict=True):
        assert torch.equal(fisher, param.float().square().to(param.dtype))


def test_a_thousand_tensors_take_two_launches(cuda):
    params, anchors, fishers = make([33] * 1000, torch.float32)
    _, expected = penalty(reference.ewc_penalty_, params, anchors, fishers, 0.5)
    groups = {"theta": params, "anchor": anchors, "F": fishers, "grad": [param.grad for param in params]}
    with cuda.recording(**{f"{name}{i}": t for name, group in groups.items() for i, t in enumerate(group)}) as launches:
        value = ops.ewc_penalty_(params, anchors, fishers, 0.5)
    assert len(launches) == 2
    exact = sum((f.double() * (p.double() - a) ** 2).sum() for p, a, f in zip(params, anchors, fishers, strict=True))
    assert value.item() == pytest.approx(0.25 * exact.item(), rel=1e-6)
    torch.testing.assert_close([param.grad for param in params], expected)


def test_it_counts_all_traffic_once(cuda):
    params, anchors, fishers = make([20000], torch.bfloat16)
    names = {"theta": params[0], "anchor": anchors[0], "F": fishers[0], "grad": params[0].grad}
    with cuda.recording(**names) as launches:
        _cuda.ewc_penalty_(params, anchors, fishers, 0.5)
    traffic = launches[0].traffic
    for name, tensor in names.items():
        assert traffic[name].bytes_read == traffic[name].unique_read == tensor.nbytes
        written = tensor.nbytes if name == "grad" else 0
        assert traffic[name].bytes_written == traffic[name].unique_written == written


def test_the_order_of_threads_and_blocks_changes_no_bit(cuda):
    params, anchors, fishers = make([40000, 9, 17000], torch.float32)
    results = []
    for seed in range(4):
        cuda.schedule(seed)
        results.append(penalty(_cuda.ewc_penalty_, params, anchors, fishers, 0.5))
    for value, grads in results[1:]:
        assert value == results[0][0]
        assert all(map(torch.equal, grads, results[0][1]))


def test_a_table_is_not_taken_for_that_of_tensors_elsewhere(cuda):
    params, anchors, fishers = make([100, 50], torch.float32)
    _cuda.ewc_penalty_(params, anchors, fishers, 0.5)
    params[0].grad = torch.zeros(100)
    _cuda.ewc_penalty_(params, anchors, fishers, 0.5)
    torch.testing.assert_close(params[0].grad, 0.5 * fishers[0] * (params[0] - anchors[0]))


def test_torchs_default_device_is_not_where_a_table_is_written(cuda):
    grads, _, fishers = make([100, 50], torch.float32)
    with torch.device("meta"):
        _cuda.ewc_accumulate_(fishers, grads, 0.5)


def test_no_tensors_and_no_elements(cuda):
    assert ops.ewc_penalty_([], [], None, 1.0).item() == 0
    params, anchors, fishers = make([0, 0], torch.float32)
    assert ops.ewc_penalty_(params, anchors, fishers, 1.0).item() == 0
    ops.ewc_accumulate_([], [])
