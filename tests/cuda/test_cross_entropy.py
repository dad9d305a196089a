"""Softmax cross-entropy in CUDA, emulated: losses, predictions and gradients against fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbuilder import ops
from llmbuilder.ops import _cuda, reference

NARROW = [torch.float32, torch.bfloat16, torch.float16]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 6),
    columns=st.sampled_from([1, 2, 7, 8, 9, 100, 4095, 4096, 4097, 9000]),
    dtype=st.sampled_from(NARROW),
    softcap=st.sampled_from([0.0, 5.0]),
    weighted=st.booleans(),
    scale=st.sampled_from([0.1, 4.0, 20.0]),
)
def test_losses_and_gradients_err_no_more_than_torchs(
    emulator, check_error, rows, columns, dtype, softcap, weighted, scale
):
    ways = [[], [], []]
    for _ in range(4):
        logits = (scale * torch.randn(rows, columns)).to(dtype)
        targets, weights = torch.randint(columns, (rows,)), torch.randn(rows) if weighted else None
        for way, wide in ((1, dtype), (2, torch.float64)):
            grad = logits.to(wide, copy=True)
            factors = None if weights is None else weights.to(torch.promote_types(wide, torch.float32))
            losses, predictions = reference.softmax_cross_entropy_(grad, targets, factors, softcap, True)
            ways[way].append((losses, grad))
        with emulator.serving():
            losses, found = _cuda.softmax_cross_entropy_(logits, targets, weights, softcap, True)
        assert losses.dtype == torch.float32
        if not softcap:  # which can make different logits equal
            assert torch.equal(found, predictions)
        ways[0].append((losses, logits))
    for i, name in enumerate(("losses", "gradient")):
        check_error(*([draw[i] for draw in way] for way in ways), name)


def test_the_first_of_equally_large_logits_is_predicted(cuda):
    logits = torch.zeros(5, 5000)
    places = [(0, 4999), (3, 4), (4096, 4100), (9, 4105), (1, 2)]
    for row, columns in enumerate(places):
        logits[row, list(columns)] = 7.0
    _, predictions = _cuda.softmax_cross_entropy_(logits, torch.zeros(5, dtype=torch.int64), None, 0.0, False)
    assert predictions.tolist() == [min(columns) for columns in places]


def test_logits_stay_when_no_gradient_is_wanted(cuda):
    logits = torch.randn(3, 100)
    before = logits.clone()
    with cuda.recording(logits=logits) as launches:
        _cuda.softmax_cross_entropy_(logits, torch.tensor([1, 2, 3]), None, 0.0, False)
    assert torch.equal(logits, before)
    assert launches[0].traffic["logits"].bytes_read == logits.nbytes + 4 * 512 * 3  # each thread reads the target's
    assert launches[0].traffic["logits"].bytes_written == 0


@pytest.mark.parametrize(
    "logits",
    [
        [torch.inf, 0.0, 1.0],
        [-torch.inf, 0.0, 1.0],
        [-torch.inf, -torch.inf, -torch.inf],
        [torch.nan, 0.0, 1.0],
        [3e38, -3e38, 0.0],
        [0.0, -torch.inf, -torch.inf],
    ],
)
def test_what_is_not_finite_goes_through_as_in_the_formula(cuda, logits):
    found, expected = torch.tensor([logits]), torch.tensor([logits])
    target = torch.tensor([0])
    losses, _ = _cuda.softmax_cross_entropy_(found, target, None, 0.0, True)
    expected_losses, _ = reference.softmax_cross_entropy_(expected, target, None, 0.0, True)
    torch.testing.assert_close(losses, expected_losses, equal_nan=True)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_a_sure_prediction_has_a_tiny_gradient_not_zero(cuda):
    """p - 1 at the target, within the last place of p, and p elsewhere, also where p is one but for a ten-millionth."""
    logits = torch.tensor([[16.0, 0.0, 0.0]])
    exact = logits.double().softmax(-1) - torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    _cuda.softmax_cross_entropy_(logits, torch.tensor([0]), None, 0.0, True)
    torch.testing.assert_close(logits[:, 1:].double(), exact[:, 1:], rtol=1e-6, atol=0)
    assert abs(float(logits[0, 0]) - float(exact[0, 0])) < 1.2e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_through_the_public_operator_with_gradients(cuda, monkeypatch, dtype):
    x, weight, bias = torch.randn(7, 5), torch.randn(130, 5), torch.randn(130)
    targets = torch.tensor([3, -100, 129, 0, 5, -100, 64])

    def results():
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        loss = ops.linear_cross_entropy(leaves[0], leaves[1], targets, leaves[2], softcap=3.0)
        return [loss, *torch.autograd.grad(loss, leaves)]

    with cuda.recording() as launches:
        found = results()
    assert [launch.kernel for launch in launches] == ["cross_entropy_kernel"]
    monkeypatch.setenv("LLMBUILDER_BACKEND", "reference")
    for a, b in zip(found, results(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_order_of_threads_and_blocks_changes_no_bit(cuda):
    logits, targets = torch.randn(4, 5000), torch.randint(5000, (4,))
    results = []
    for seed in range(4):
        cuda.schedule(seed)
        grad = logits.clone()
        results.append((*_cuda.softmax_cross_entropy_(grad, targets, None, 0.0, True), grad))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_the_launcher_refuses_a_vocabulary_that_it_cannot_count(cuda):
    kernels = _cuda._kernels
    arguments = (16, 0, 0.0, False, 16, 16, 0, 0)
    for columns in (0, 2**31):
        with pytest.raises(ValueError, match=f"1 to 2.31 - 1 columns, not {columns}"):
            kernels.softmax_cross_entropy(kernels.DType.f32, (16, 1, columns, columns), *arguments)
