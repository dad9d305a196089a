"""EWC over many tensors, interpreted: against fp64, within the tensors whose addresses the table holds."""

import guard
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from llmbuilder.kernels import ewc
from llmbuilder.ops import reference

SIZES = st.lists(
    st.one_of(st.integers(0, 40), st.sampled_from([1023, 1024, 1025, ewc.CHUNK - 1, ewc.CHUNK, ewc.CHUNK + 1])),
    min_size=1,
    max_size=6,
)


class Tensors:
    """Parameters with gradients, anchors and Fisher values, some where no allocation starts."""

    def __init__(self, sizes, dtype, offset, seed):
        torch.manual_seed(seed)

        def tensors():
            return [torch.randn(size + offset).to(dtype)[offset:] for size in sizes]

        self.params, self.anchors, self.grads = tensors(), tensors(), tensors()
        self.fishers = [fisher.square() for fisher in tensors()]
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad.clone() if not offset else torch.cat([grad.new_zeros(1), grad])[1:]

    def doubled(self):
        copy = object.__new__(Tensors)
        for name in ("params", "anchors", "fishers", "grads"):
            setattr(copy, name, [t.detach().double() for t in getattr(self, name)])
        for param, grad in zip(copy.params, copy.grads, strict=True):
            param.grad = grad.clone()
        return copy

    def again(self):
        copy = object.__new__(Tensors)
        copy.params, copy.anchors = [p.detach().clone() for p in self.params], self.anchors
        copy.fishers, copy.grads = [f.clone() for f in self.fishers], self.grads
        for param, grad in zip(copy.params, copy.grads, strict=True):
            param.grad = grad.clone()
        return copy

    def allowed(self):
        grads = [param.grad for param in self.params]
        return guard.allow(*self.params, *self.anchors, *self.fishers, *self.grads, *grads)


@given(
    sizes=SIZES,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    weighted=st.booleans(),
    offset=st.integers(0, 1),
    seed=st.integers(0, 2**32),
)
@example(sizes=[ewc.CHUNK + 1, 5], dtype=torch.float32, weighted=True, offset=0, seed=0)
@example(sizes=[3, 2 * ewc.CHUNK + 1], dtype=torch.float16, weighted=False, offset=1, seed=0)
def test_penalty(check_error, sizes, dtype, weighted, offset, seed):
    ours = Tensors(sizes, dtype, offset, seed)
    same, exact = ours.again(), ours.doubled()
    with ours.allowed():
        value = ewc.ewc_penalty_(ours.params, ours.anchors, ours.fishers if weighted else None, 0.7)
    plain = reference.ewc_penalty_(same.params, same.anchors, same.fishers if weighted else None, 0.7)
    truth = reference.ewc_penalty_(exact.params, exact.anchors, exact.fishers if weighted else None, 0.7)
    assert value.dtype == torch.float64 and value.shape == ()
    torch.testing.assert_close(value, truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(plain, truth, rtol=1e-2, atol=0)
    for i, (a, b, c) in enumerate(zip(ours.params, same.params, exact.params, strict=True)):
        check_error([a.grad], [b.grad], [c.grad], f"gradient {i}")


@given(
    sizes=SIZES,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    offset=st.integers(0, 1),
    seed=st.integers(0, 2**32),
)
def test_accumulate(check_error, sizes, dtype, offset, seed):
    ours = Tensors(sizes, dtype, offset, seed)
    same, exact = ours.again(), ours.doubled()
    with ours.allowed():
        ewc.ewc_accumulate_(ours.fishers, ours.grads, 0.3)
    reference.ewc_accumulate_(same.fishers, same.grads, 0.3)
    reference.ewc_accumulate_(exact.fishers, exact.grads, 0.3)
    for i, (a, b, c) in enumerate(zip(ours.fishers, same.fishers, exact.fishers, strict=True)):
        check_error([a], [b], [c], f"Fisher {i}")


def test_two_launches_for_a_thousand_tensors():
    tensors, before = Tensors([1] * 1000, torch.bfloat16, 0, 1), guard.State.launches
    exact = tensors.doubled()
    with tensors.allowed():
        value = ewc.ewc_penalty_(tensors.params, tensors.anchors, tensors.fishers, 2.0)
    assert guard.State.launches - before == 2
    truth = reference.ewc_penalty_(exact.params, exact.anchors, exact.fishers, 2.0)
    torch.testing.assert_close(value, truth, rtol=1e-6, atol=0)


def test_the_same_bits_in_any_order_of_the_programs():
    first = Tensors([3, ewc.CHUNK + 1, 20, 1500, 2 * ewc.CHUNK], torch.float32, 0, 1)
    second, values = first.again(), []
    for tensors in (first, second):
        with tensors.allowed():
            values.append(ewc.ewc_penalty_(tensors.params, tensors.anchors, tensors.fishers, 2.0))
    assert torch.equal(*values)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(first.params, second.params, strict=True))


def test_a_table_is_not_taken_for_that_of_tensors_elsewhere():
    tensors = Tensors([5, ewc.CHUNK + 1], torch.float32, 0, 1)
    with tensors.allowed():
        values = [ewc.ewc_penalty_(tensors.params, tensors.anchors, tensors.fishers, 2.0) for _ in range(2)]
        assert values[0] == values[1]
        tensors.anchors[0] = tensors.anchors[0] + 1
    with tensors.allowed():
        assert ewc.ewc_penalty_(tensors.params, tensors.anchors, tensors.fishers, 2.0) != values[0]


def test_torchs_default_device_is_not_where_a_table_is_written():
    tensors = Tensors([5, ewc.CHUNK + 1], torch.float32, 0, 1)
    with tensors.allowed(), torch.device("meta"):
        ewc.ewc_accumulate_(tensors.fishers, tensors.grads, 0.3)


def test_no_tensors():
    assert ewc.ewc_accumulate_([], [], 1.0) is None
    empty = Tensors([0], torch.float32, 0, 1)
    assert ewc.ewc_penalty_(empty.params, empty.anchors, None, 1.0) == 0


@pytest.mark.parametrize("strength", [0.0, -1.5, 1e3])
def test_any_strength(strength):
    ours = Tensors([50], torch.float32, 0, 4)
    exact = ours.doubled()
    with ours.allowed():
        value = ewc.ewc_penalty_(ours.params, ours.anchors, ours.fishers, strength)
    torch.testing.assert_close(value, reference.ewc_penalty_(exact.params, exact.anchors, exact.fishers, strength))
    torch.testing.assert_close(ours.params[0].grad.double(), exact.params[0].grad, rtol=1e-5, atol=1e-5)
