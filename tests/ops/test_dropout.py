"""The public dropout: its mask, its gradient, its seed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from llmbuilder.ops import _backend, dropout, dropout_mask, reference
from llmbuilder.ops.dropout import apply_mask, seed_like

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def layouts(x):
    """x itself, and views of the same values that are not contiguous."""
    yield "contiguous", x
    yield "transposed", x.transpose(0, -1).contiguous().transpose(0, -1)
    yield "sliced", torch.cat([x, x], -1)[..., : x.shape[-1]]
    yield "offset", torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 40), max_size=3),
    st.integers(0, 65535),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**32 - 1),
)
def test_every_backend_draws_the_bits_of_the_reference(shape, threshold, seed, stream):
    seed = torch.tensor(seed)
    keep = reference.keep_mask(tuple(shape), threshold, seed, stream)
    assert torch.equal(dropout_mask(shape, threshold / 65536, seed, stream), keep)
    for dtype in DTYPES:
        x = torch.randn(shape).to(dtype)
        y = _backend.serve("dropout", x)(x, threshold, seed, stream)
        assert torch.equal(y, reference.dropout(x, threshold, seed, stream))
        assert y.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 70), (7,), (0, 5), (5, 0), (1, 1)])
def test_elements_are_kept_and_scaled_or_zero(backend, shape, dtype):
    x = torch.randn(shape).to(dtype)
    keep, seed = dropout_mask(shape, 0.3, torch.tensor(17), 3), torch.tensor(17)
    threshold = int(65536 * 0.3 + 0.5)
    expected = torch.where(keep, x * (65536 / (65536 - threshold)), 0)
    for name, view in layouts(x) if x.dim() > 1 else [("contiguous", x)]:
        assert torch.equal(dropout(view, 0.3, seed, 3), expected), name


def test_gradient_in_fp64_is_the_masks():
    x, seed = torch.randn(2, 2, 11, dtype=torch.float64, requires_grad=True), torch.tensor(8)
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.4, seed, 2), (x,))
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, 0.4, seed, 2), (x,))


def test_gradient_uses_the_mask_of_the_forward_pass(backend):
    x = torch.randn(9, 130, requires_grad=True)
    y = dropout(x, 0.25)
    grad = torch.randn(130, 9).t()
    y.backward(grad)
    assert torch.equal(x.grad != 0, y != 0)
    assert torch.equal(x.grad, torch.where(y != 0, grad * (65536 / 49152), 0))


def test_registered_as_torch_wants_it():
    x = torch.randn(6, 20, requires_grad=True)
    torch.library.opcheck(apply_mask, (x, 9000, torch.tensor(3), 1))
    torch.library.opcheck(seed_like, (x.detach(),), test_utils=("test_schema", "test_faketensor"))
    assert torch.Tag.nondeterministic_seeded in torch.ops.llmbuilder.seed_like.default.tags


def test_share_of_zeros_is_p():
    for p in (0.0, 1 / 65536, 0.1, 0.5, 0.999):
        n = 4_000_000
        share = 1 - dropout_mask((2000, 2000), p, torch.tensor(12345)).float().mean().item()
        assert abs(share - p) <= 5 * (p * (1 - p) / n) ** 0.5, f"{share} dropped at p = {p}"


def test_streams_seeds_rows_and_columns_are_independent():
    """Agreement of two fair masks is one half; five standard deviations for each of the pairs."""
    keep = dropout_mask((512, 512), 0.5, torch.tensor(1), 0)
    others = {
        "stream": dropout_mask((512, 512), 0.5, torch.tensor(1), 1),
        "seed": dropout_mask((512, 512), 0.5, torch.tensor(2), 0),
        "high half of the seed": dropout_mask((512, 512), 0.5, torch.tensor(1 + 2**32), 0),
        "row": keep.roll(1, 0),
        "column": keep.roll(1, 1),
        "call": keep.roll(8, 1),
        "transposed": keep.t(),
    }
    for name, other in others.items():
        agreement = (keep == other).float().mean().item()
        assert abs(agreement - 0.5) < 5 * 0.5 / 512, f"{name}: {agreement}"


def test_torchs_generator_alone_decides_the_seed():
    x = torch.ones(64, 64)
    torch.manual_seed(3)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5), first)
    assert torch.equal(dropout(x, 0.5), second)
    assert not torch.equal(first, second)


def test_the_number_of_threads_does_not_change_a_bit(backend):
    before, x, seed = torch.get_num_threads(), torch.randn(301, 513), torch.tensor(4)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(dropout(x, 0.1, seed))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_p_of_zero_is_the_tensor_itself():
    x = torch.randn(3)
    assert dropout(x, 0.0) is x
    assert dropout(x, 0.4 / 65536) is x
    assert dropout_mask((3, 5), 0.0, torch.tensor(0)).all()


def test_nothing_but_the_seed_is_kept():
    kept = []
    x = torch.randn(50, 60, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dropout(x, 0.5)
    assert [t.numel() for t in kept] == [1]


def passes(function, x):
    torch.manual_seed(0)
    y = function(x)
    return y, torch.autograd.grad(y.square().sum(), x)[0]


def test_compiled_checkpointed_and_both_repeat_the_eager_mask():
    def function(x):
        return dropout((x * 2).sin(), 0.3) + dropout(x, 0.5)

    def recomputed(x):
        return checkpoint(function, x, use_reentrant=False)

    x = torch.randn(16, 33, requires_grad=True)
    y, dx = passes(function, x)
    for other in (recomputed, torch.compile(function, fullgraph=True), torch.compile(recomputed, fullgraph=True)):
        y2, dx2 = passes(other, x)
        torch.testing.assert_close(y2, y)
        torch.testing.assert_close(dx2, dx)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"p": 1.0}, r"dropout: p must lie in \[0, 1\) and not round to 1.*got 1.0"),
        ({"p": 0.999999}, "not round to 1"),
        ({"p": -0.1}, "got -0.1"),
        ({"p": float("nan")}, "got nan"),
        ({"x": torch.ones(3, dtype=torch.int64)}, "dropout: x must be floating point, got torch.int64"),
        ({"seed": torch.tensor(1.0)}, "seed must be an int64 scalar tensor on cpu, .* got torch.float32"),
        ({"seed": torch.tensor([1])}, r"got torch.int64 of shape \[1\]"),
        ({"seed": torch.tensor(1, device="meta")}, "on meta"),
        ({"seed": 7}, r"seed must be an int64 scalar tensor on cpu, as torch.tensor\(7\) is, got 7"),
        ({"stream": -1}, r"stream must lie in \[0, 2\*\*32\), got -1"),
        ({"stream": 2**32}, "got 4294967296"),
    ],
)
def test_errors_say_what_was_wrong(arguments, words):
    with pytest.raises(ValueError, match=words):
        dropout(**{"x": torch.ones(3), "p": 0.5, **arguments})


def test_the_masks_errors_are_its_own():
    with pytest.raises(ValueError, match=r"dropout_mask: p must lie in .* got 2"):
        dropout_mask((3,), 2, torch.tensor(0))
    with pytest.raises(ValueError, match=r"dropout_mask: seed must be an int64 scalar tensor on cpu, as .* got 7"):
        dropout_mask((3,), 0.5, 7)


def test_more_rows_than_the_counter_holds_are_refused():
    with pytest.raises(ValueError, match=r"at most 2\*\*32 rows"):
        dropout(torch.ones(1, 1).expand(2**32 + 1, 1), 0.5)
