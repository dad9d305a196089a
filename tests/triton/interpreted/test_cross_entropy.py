"""Softmax and cross-entropy in place, interpreted: against fp64 over drawn shapes, and at the edges of the formula."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from llmbuilder.kernels import cross_entropy
from llmbuilder.ops import reference


@given(
    rows=st.integers(1, 4),
    columns=st.one_of(st.integers(1, 300), st.sampled_from([4095, 4096, 4097, 9000])),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    weighted=st.booleans(),
    softcap=st.sampled_from([0.0, 2.0, 30.0]),
    spread=st.sampled_from([0.01, 1.0, 20.0]),
    seed=st.integers(0, 2**32),
)
@example(rows=2, columns=9000, dtype=torch.float32, weighted=True, softcap=0.0, spread=1.0, seed=0)
@example(rows=2, columns=4097, dtype=torch.bfloat16, weighted=False, softcap=2.0, spread=1.0, seed=0)
def test_losses_predictions_and_gradient(check_error, rows, columns, dtype, weighted, softcap, spread, seed):
    torch.manual_seed(seed)
    losses, gradients = ([], [], []), ([], [], [])
    for _ in range(16 if columns < 300 else 4):
        logits = (spread * torch.randn(rows, columns)).to(dtype)
        targets, weights = torch.randint(columns, (rows,)), torch.rand(rows) if weighted else None
        ways = [(cross_entropy, logits.clone()), (reference, logits.clone()), (reference, logits.double())]
        for i, (way, values) in enumerate(ways):
            loss, best = way.softmax_cross_entropy_(values, targets, weights, softcap, True)
            losses[i].append(loss), gradients[i].append(values)
            if way is cross_entropy:
                check_predictions(logits.float(), best, softcap)
    check_error(*losses, "loss")
    check_error(*gradients, "gradient")


def check_predictions(logits, predictions, softcap):
    """Largest logits; the first of them, but where the cap makes equal what was not."""
    capped = softcap * torch.tanh(logits / softcap) if softcap else logits
    torch.testing.assert_close(capped.gather(1, predictions[:, None]).squeeze(1), capped.amax(1), rtol=1e-6, atol=0)
    if not softcap:
        assert torch.equal(predictions, logits.argmax(1))


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_without_a_gradient_the_logits_stay(softcap):
    logits = torch.randn(4, 70)
    before = logits.clone()
    loss, _ = cross_entropy.softmax_cross_entropy_(logits, torch.zeros(4, dtype=torch.int64), None, softcap, False)
    assert torch.equal(logits, before) and torch.isfinite(loss).all()


def test_of_equal_logits_the_first_is_predicted():
    logits = torch.zeros(3, 5000)
    logits[1, 4500], logits[2, 77], logits[2, 4600] = 1, 2, 2
    _, best = cross_entropy.softmax_cross_entropy_(logits, torch.zeros(3, dtype=torch.int64), None, 0.0, False)
    assert best.tolist() == [0, 4500, 77]


def test_columns_of_minus_infinity_count_nothing():
    logits = torch.randn(3, 50)
    logits[:, :20] = -torch.inf
    exact, targets = logits.double(), torch.tensor([30, 40, 49])
    loss, best = cross_entropy.softmax_cross_entropy_(logits, targets, None, 0.0, True)
    truth, prediction = reference.softmax_cross_entropy_(exact, targets, None, 0.0, True)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(best, prediction)


def test_a_target_that_is_almost_certain_keeps_its_small_gradient():
    """1 - p of about e^-20 is lost where p is rounded to 1 first."""
    logits = torch.tensor([[20.0, 0.0, 0.0]])
    exact = logits.double()
    cross_entropy.softmax_cross_entropy_(logits, torch.tensor([0]), None, 0.0, True)
    reference.softmax_cross_entropy_(exact, torch.tensor([0]), None, 0.0, True)
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_its_row_alone(value):
    logits = torch.randn(3, 50)
    logits[1, 7] = value
    loss, _ = cross_entropy.softmax_cross_entropy_(logits, torch.tensor([1, 2, 3]), None, 0.0, True)
    assert loss.isfinite().tolist() == [True, False, True]
    assert logits.isfinite().all(1).tolist() == [True, False, True]


def test_rows_apart():
    wide = torch.full((4, 60), torch.nan)
    wide[:, 3:53] = torch.randn(4, 50)
    logits, targets = wide[:, 3:53], torch.randint(50, (4,))
    copy = logits.clone()
    for view in (logits, copy):
        cross_entropy.softmax_cross_entropy_(view, targets, None, 0.0, True)
    assert torch.equal(logits, copy) and wide[:, :3].isnan().all() and wide[:, 53:].isnan().all()


def test_losses_are_fp32_whatever_torchs_default():
    logits = torch.randn(3, 40)
    torch.set_default_dtype(torch.bfloat16)
    try:
        losses, _ = cross_entropy.softmax_cross_entropy_(logits.clone(), torch.arange(3), None, 0.0, False)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(logits, torch.arange(3), reduction="none"))
