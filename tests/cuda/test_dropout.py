"""Dropout in CUDA, emulated: the reference's bits, its gradient, and that each thread keeps to its eight columns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbuilder import ops
from llmbuilder.ops import _cuda, reference

NARROW = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = st.integers(-(2**63), 2**63 - 1)


def offset(x):
    """The same values one element further on than an allocation begins."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@settings(deadline=None, max_examples=120)
@given(
    shape=st.lists(st.integers(0, 40), max_size=2).flatmap(
        lambda lead: st.sampled_from([0, 1, 7, 8, 63, 64, 65, 256, 2049]).map(lambda columns: (*lead, columns))
    ),
    dtype=st.sampled_from(NARROW),
    threshold=st.sampled_from([1, 6554, 32768, 65535]),
    seed=SEEDS,
    stream=st.integers(0, 2**32 - 1),
    misaligned=st.booleans(),
)
def test_every_bit_is_the_references(emulator, shape, dtype, threshold, seed, stream, misaligned):
    x, seed = torch.randn(shape).to(dtype), torch.tensor(seed)
    x = offset(x) if misaligned else x
    expected = reference.dropout(x, threshold, seed, stream)
    with emulator.serving():
        assert torch.equal(_cuda.dropout(x, threshold, seed, stream), expected)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 70),
    columns=st.sampled_from([1, 7, 8, 9, 255, 2049]),
    threshold=st.sampled_from([0, 1, 6554, 65535]),
    seed=SEEDS,
    stream=st.integers(0, 2**32 - 1),
)
def test_the_mask_is_the_references(emulator, rows, columns, threshold, seed, stream):
    seed = torch.tensor(seed)
    with emulator.serving():
        keep = _cuda.dropout_mask((rows, columns), threshold, seed, stream)
    assert torch.equal(keep, reference.keep_mask((rows, columns), threshold, seed, stream))


def test_a_value_that_is_not_finite_is_dropped_or_goes_through(cuda):
    x = torch.tensor([torch.inf, -torch.inf, torch.nan]).repeat(50)
    keep = reference.keep_mask(x.shape, 32768, torch.tensor(1), 0)
    y = _cuda.dropout(x, 32768, torch.tensor(1), 0)
    assert torch.equal(y[~keep], torch.zeros(int((~keep).sum())))
    assert not torch.isfinite(y[keep]).any()


def test_through_the_public_operator_with_the_same_mask_on_the_gradient(cuda):
    x, seed = torch.randn(3, 5, 63, requires_grad=True), torch.tensor(-7)
    y = ops.dropout(x, 0.25, seed, 3)
    keep = reference.keep_mask(x.shape, 16384, seed, 3)
    dY = torch.randn_like(x)
    assert torch.equal(y, torch.where(keep, x * (4 / 3), 0))
    assert torch.equal(torch.autograd.grad(y, x, dY)[0], torch.where(keep, dY * (4 / 3), 0))


def test_the_order_of_threads_and_blocks_changes_no_bit(schedule, cuda):
    x, seed = torch.randn(30, 600).bfloat16(), torch.tensor(5)
    assert torch.equal(_cuda.dropout(x, 6554, seed, 0), reference.dropout(x, 6554, seed, 0))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("columns", [64, 63])
def test_x_is_read_once_and_y_written_once(cuda, dtype, columns):
    x = torch.randn(40, columns).to(dtype)
    with cuda.recording(x=x) as launches:
        y = _cuda.dropout(x, 6554, torch.tensor(5), 0)
    (launch,) = launches
    assert launch.traffic["x"].bytes_read == launch.traffic["x"].unique_read == x.nbytes
    (written,) = [traffic for name, traffic in launch.traffic.items() if traffic.bytes_written]
    assert written.bytes_written == written.unique_written == y.nbytes


def test_more_rows_than_the_grid_has_blocks(cuda):
    x, seed = torch.ones(4099, 1025, dtype=torch.bfloat16), torch.tensor(5)
    with cuda.recording() as launches:
        y = _cuda.dropout(x, 32768, seed, 1)
    assert launches[0].grid[1] < len(x)
    assert torch.equal(y, reference.dropout(x, 32768, seed, 1))


@pytest.mark.parametrize(
    "rows, columns, mask, words",
    [
        (2, 8, (0, 0, 7), "dropout: the mask's seed is null"),
        (2, 8, (1, 0, 65536), "dropout: the mask's threshold is 65536, must be below 65536"),
        (2**32 + 1, 8, (1, 0, 7), r"dropout: a mask has at most 2\^32 rows, got 4294967297"),
        (1, 2**35 + 1, (1, 0, 7), r"dropout: a mask has at most 2\^35 columns, got 34359738369"),
    ],
)
def test_the_launcher_refuses_what_has_no_mask(cuda, rows, columns, mask, words):
    kernels = _cuda._kernels
    with pytest.raises(ValueError, match=words):
        kernels.dropout(kernels.DType.f32, 16, 16, rows, columns, mask, 0, 0)
