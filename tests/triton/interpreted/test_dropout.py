"""Dropout, interpreted: the reference's bits, each element written once."""

import guard
import numpy as np
import pytest
import torch

from llmbuilder.kernels.dropout import dropout
from llmbuilder.ops import reference

CASES = [(19661, -5, 2**32 - 1), (1, 2**62, 0), (65535, 0, 1), (32768, -(2**63), 2**31), (0, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (3, 37), (5, 513), (2, 3, 8), (9, 1), (0, 4), (4, 0), (13, 1030)])
@pytest.mark.parametrize("threshold, seed, stream", CASES[:1])
def test_the_references_bits(shape, dtype, threshold, seed, stream):
    x = torch.randn(shape).to(dtype)
    y = dropout(x, threshold, torch.tensor(seed), stream)
    assert torch.equal(y, reference.dropout(x, threshold, torch.tensor(seed), stream))
    assert y.numel() == 0 or np.count_nonzero(guard.State.launch.writers != guard.NOBODY) == y.numel()


@pytest.mark.parametrize("threshold, seed, stream", CASES)
def test_every_part_of_the_key(threshold, seed, stream):
    x = torch.ones(70, 70)
    y = dropout(x, threshold, torch.tensor(seed), stream)
    assert torch.equal(y, reference.dropout(x, threshold, torch.tensor(seed), stream))


def test_published_bits():
    """By the definition's table in csrc/include/llmbuilder/philox.h, written out in Python's whole numbers."""
    seed, stream, threshold = 0x123456789ABCDEF0, 3, 30000

    def words(call, row):
        counter, key = [call, row, stream, 0], [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(7):
            high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
            high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
            counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
            key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
        return counter

    def keep(row, column):
        word = words(column // 8, row)[column % 8 // 2]
        return (word >> 16 if column % 2 else word % 2**16) >= threshold

    expected = torch.tensor([[keep(row, column) for column in range(20)] for row in range(6)])
    assert torch.equal(dropout(torch.ones(6, 20), threshold, torch.tensor(seed), stream) != 0, expected)


def test_a_slice_equal_to_the_threshold_keeps():
    seed, x = torch.tensor(9), torch.ones(1, 8)
    words = reference.philox(tuple(torch.tensor(n) for n in (0, 0, 5, 0)), seed)
    slices = torch.stack([words & 0xFFFF, words >> 16], -1).flatten().tolist()
    for column, threshold in enumerate(slices):
        assert dropout(x, threshold, seed, 5)[0, column] != 0 and dropout(x, threshold + 1, seed, 5)[0, column] == 0


def test_what_is_dropped_is_zero_even_where_it_is_not_finite():
    x = torch.full((8, 100), torch.inf)
    y = dropout(x, 32768, torch.tensor(1), 0)
    assert set(y.flatten().tolist()) == {0.0, torch.inf}
