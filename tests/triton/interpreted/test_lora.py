"""The LoRA operators, interpreted: against fp64 over drawn shapes, layouts and masks."""

import guard
import pytest
import torch
from gpusim.matrices import far_apart
from hypothesis import given
from hypothesis import strategies as st

from llmbuilder.kernels import lora
from llmbuilder.kernels.lora_grad_ax import part_rows
from llmbuilder.kernels.lora_grad_sb import COLUMNS, PART_ROWS
from llmbuilder.ops import reference

NARROW = [torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "sliced", "offset"]
ranks = st.one_of(st.integers(1, 33), st.integers(1, 256))
sizes = st.one_of(st.integers(1, 140), st.sampled_from([0, 16, 63, 64, 128]))
cases = {
    "M": sizes,
    "N": sizes,
    "K": st.one_of(st.just(63), sizes),
    "r": ranks,
    "dtype": st.sampled_from([torch.float32, *NARROW]),
    "threshold": st.sampled_from([0, 1, 6554, 32768, 65535]),
    "stream": st.sampled_from([0, 1, 2**32 - 1]),
    "layout": st.sampled_from(LAYOUTS),
    "seed": st.integers(0, 2**32),
}


def drawn(function):
    """Once for each drawn case, its tensors made from the case's seed."""
    return given(**cases)(function)


def laid(values, layout):
    """The values as rows that lie apart, with NaN between them, or not where an allocation starts."""
    if layout == "contiguous" or not values.numel():
        return values
    rows, columns = values.shape
    if layout == "sliced":
        wide = torch.full((rows, columns + 5), torch.nan, dtype=values.dtype)
        wide[:, 2:-3] = values
        return wide[:, 2:-3]
    flat = torch.full((rows * columns + 1,), torch.nan, dtype=values.dtype)
    flat[1:] = values.flatten()
    return flat[1:].view(rows, columns)


class Layer:
    """Tensors of one case, of order one in and out, and what its mask goes by."""

    def __init__(self, M, N, K, r, dtype, threshold, stream, layout, seed):
        torch.manual_seed(seed)

        def matrix(rows, columns, inner):
            return laid((torch.randn(rows, columns) / max(inner, 1) ** 0.5).to(dtype), layout)

        self.x, self.W, self.bias = matrix(M, K, 1), matrix(N, K, K), torch.randn(N).to(dtype)
        self.A, self.B = matrix(r, K, K), matrix(N, r, r)
        self.S, self.dS, self.dY = matrix(M, r, 1), matrix(M, r, 1), matrix(M, N, 1)
        self.mask = (threshold, torch.randint(-(2**62), 2**62, ()), stream)


def compare(check_error, names, operator, expected, draws, *rest):
    """operator(*inputs, *rest) against expected(...) in fp64, over all draws, by expected's error in their dtype."""
    ways = [], [], []
    for inputs in draws:
        doubled = (None if t is None else t.double() for t in inputs)
        for way, function, given_ in zip(ways, (operator, expected, expected), (inputs, inputs, doubled), strict=True):
            way.append(results(function(*given_, *rest)))
    for i, name in enumerate(names):
        check_error(*([draw[i] for draw in way] for way in ways), name)


def drawn_inputs(case, *names):
    """Those tensors of some layers of a case, of more the smaller they are: one small result's error is chance."""
    layers = [Layer(**case)]
    count = 16 if max(case["M"] * case["N"], case["M"] * case["K"]) <= 2000 else 2
    layers += [Layer(**case | {"seed": case["seed"] + i}) for i in range(1, count)]
    return layers[0], [tuple(name and getattr(layer, name) for name in names) for layer in layers]


def results(value):
    return [t for t in (value if isinstance(value, tuple) else (value,)) if t is not None]


@drawn
def test_shrink(check_error, **case):
    layer, draws = drawn_inputs(case, "x", "A")
    compare(check_error, ["S"], lora.lora_shrink, reference.lora_shrink, draws, *layer.mask)


@pytest.mark.parametrize("with_bias", [True, False])
@drawn
def test_expand(check_error, with_bias, **case):
    _, draws = drawn_inputs(case, "S", "B", "bias" if with_bias else None)
    compare(check_error, ["y"], lora.lora_expand, reference.lora_expand, draws, 1.5)


@drawn
def test_expand_in_place(check_error, **case):
    def added(expand):
        def call(y, S, B):
            result = laid(y.clone(), case["layout"])
            expand(result, S, B, 1.5)
            return result

        return call

    _, draws = drawn_inputs(case, "dY", "S", "B")
    compare(check_error, ["y"], added(lora.lora_expand_), added(reference.lora_expand_), draws)


@drawn
def test_grad_sb(check_error, **case):
    _, draws = drawn_inputs(case, "dY", "S", "B")
    compare(check_error, ["dS", "dB"], lora.lora_grad_sb, reference.lora_grad_sb, draws, 1.5)


@pytest.mark.parametrize("need_x", [True, False])
@drawn
def test_grad_ax(check_error, need_x, **case):
    layer, draws = drawn_inputs(case, "x", "dS", "A")
    names = ["dA", "dX"] if need_x else ["dA"]
    compare(check_error, names, lora.lora_grad_ax, reference.lora_grad_ax, draws, *layer.mask, need_x)


@pytest.mark.parametrize("with_bias", [True, False])
@drawn
def test_fused(check_error, with_bias, **case):
    _, draws = drawn_inputs(case, "x", "W", "bias" if with_bias else None, "S", "B")
    compare(check_error, ["y"], lora.lora_fused, reference.lora_fused, draws, 1.5)


@drawn
def test_fused_grad(check_error, **case):
    layer, draws = drawn_inputs(case, "dY", "W", "dS", "A")
    compare(check_error, ["dX"], lora.lora_fused_grad, reference.lora_fused_grad, draws, *layer.mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_partial_sums_of_many_parts(check_error, dtype, extra):
    """Three parts of rows, the last one row too short, full, or one row long; and the same for columns."""
    M, N, r = 2 * PART_ROWS + extra, 2 * COLUMNS + extra, 3
    layer = Layer(M, N, 20, r, dtype, 6554, 5, "contiguous", M)
    inputs = (layer.dY[:, :20], layer.S, layer.B[:20])
    compare(check_error, ["dS", "dB"], lora.lora_grad_sb, reference.lora_grad_sb, [inputs], 1.5)
    inputs = (layer.dY[:40], layer.S[:40], layer.B)
    compare(check_error, ["dS", "dB"], lora.lora_grad_sb, reference.lora_grad_sb, [inputs], 1.5)
    M = 2 * part_rows(r) + extra
    inputs = (layer.x[:M], layer.dS[:M], layer.A)
    compare(check_error, ["dA", "dX"], lora.lora_grad_ax, reference.lora_grad_ax, [inputs], *layer.mask, True)


MASKS = [(6554, -5, 0), (32768, 2**62 + 1, 2**32 - 1), (65535, -(2**63), 7), (1, 0, 2**31)]


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("threshold, seed, stream", MASKS)
def test_every_operators_mask_to_the_bit(dtype, threshold, seed, stream):
    M, K, mask = 67, 75, (threshold, torch.tensor(seed), stream)
    keep = reference.keep_mask((M, K), *mask)
    kept = (keep * (65536 / (65536 - threshold))).to(dtype)
    ones, column, row = torch.ones(M, K).to(dtype), torch.ones(M, 1).to(dtype), torch.ones(1, K).to(dtype)
    assert torch.equal(lora.lora_shrink(ones, torch.eye(K).to(dtype), *mask), kept)
    dA, dX = lora.lora_grad_ax(ones, torch.eye(M).to(dtype), torch.eye(M, K).to(dtype), *mask, True)
    assert torch.equal(dA != 0, keep), "dA by a launch of its own"
    assert torch.equal(dX, kept * torch.eye(M, K).to(dtype)), "dX by a launch of its own"
    dA, dX = lora.lora_grad_ax(ones, column, row, *mask, True)
    assert torch.equal(dX, kept), "dX with dA"
    torch.testing.assert_close(dA[0], kept.double().sum(0).float(), rtol=1e-2, atol=0)
    nothing = torch.zeros(M, 3).to(dtype), torch.zeros(3, K).to(dtype)
    assert torch.equal(lora.lora_fused_grad(*nothing, column, row, *mask), kept)


def test_what_is_dropped_is_zero_even_where_it_is_not_finite():
    mask = (32768, torch.tensor(3), 1)
    x = torch.where(reference.keep_mask((20, 40), *mask), 1.0, torch.inf)
    S = lora.lora_shrink(x, torch.ones(2, 40), *mask)
    dA, _ = lora.lora_grad_ax(x, torch.ones(20, 2), torch.ones(2, 40), *mask, False)
    assert torch.isfinite(S).all() and torch.isfinite(dA).all()


def test_the_same_bits_in_any_order_of_the_programs():
    layer = Layer(600, 70, 90, 5, torch.float32, 6554, 1, "contiguous", 8)
    calls = [
        lambda: lora.lora_grad_sb(layer.dY, layer.S, layer.B, 0.5),
        lambda: lora.lora_grad_ax(layer.x, layer.dS, layer.A, *layer.mask, True),
    ]
    for call in calls:
        first, second = call(), call()  # each launch's order is drawn anew
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("r, launches", [(16, 2), (33, 3)])
def test_reductions_take_two_launches(r, launches):
    layer = Layer(600, 40, 40, r, torch.bfloat16, 6554, 1, "contiguous", 8)
    before = guard.State.launches
    lora.lora_grad_ax(layer.x, layer.dS, layer.A, *layer.mask, True)
    assert guard.State.launches - before == launches
    lora.lora_grad_sb(layer.dY, layer.S, layer.B, 0.5)
    assert guard.State.launches - before == 2 * launches


def test_nothing_is_copied_that_lies_in_rows_apart():
    """A slice's operators give the bits of its copy, and read nothing between its rows, which is NaN."""
    layer, same = (Layer(33, 40, 50, 4, torch.float32, 6554, 1, layout, 2) for layout in ("sliced", "contiguous"))
    for a, b in [(layer, same)]:
        assert a.x.stride() != b.x.stride()
        mask = b.mask
        assert torch.equal(lora.lora_shrink(a.x, a.A, *mask), lora.lora_shrink(b.x, b.A, *mask))
        for got, expected in zip(
            lora.lora_grad_ax(a.x, a.dS, a.A, *mask, True), lora.lora_grad_ax(b.x, b.dS, b.A, *mask, True), strict=True
        ):
            assert torch.equal(got, expected)


def test_rows_more_than_32_bits_apart():
    M, N, K, r = 5, 33, 40, 3
    layer = Layer(M, N, K, r, torch.bfloat16, 6554, 1, "contiguous", 2)
    x, dY, S = (far_apart(*t.shape, t.dtype).copy_(t) for t in (layer.x, layer.dY, layer.S))
    for near, far, operator, *arguments in [
        (layer.x, x, lora.lora_shrink, layer.A, *layer.mask),
        (layer.S, S, lora.lora_expand, layer.B, None, 0.5),
        (layer.dY, dY, lora.lora_grad_sb, layer.S, layer.B, 0.5),
        (layer.x, x, lora.lora_grad_ax, layer.dS, layer.A, *layer.mask, True),
        (layer.x, x, lora.lora_fused, layer.W, None, layer.S, layer.B, 0.5),
    ]:
        torch.testing.assert_close(operator(far, *arguments), operator(near, *arguments), rtol=0, atol=0)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_partial_sums_are_fp32_whatever_torchs_default(default):
    layer = Layer(600, 33, 40, 3, torch.bfloat16, 6554, 1, "contiguous", 2)

    def gradients():
        dS, dB = lora.lora_grad_sb(layer.dY, layer.S, layer.B, 0.5)
        return dS, dB, *lora.lora_grad_ax(layer.x, layer.dS, layer.A, *layer.mask, True)

    expected = gradients()
    torch.set_default_dtype(default)
    try:
        found = gradients()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
