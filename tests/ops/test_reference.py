"""The reference against formulas of its own: published Philox vectors, a table of mask bits, autograd in fp64."""

import pytest
import torch
from torch.nn import functional as F

from llmbuilder.ops import reference

# kat_vectors of Random123 (Salmon et al. 2011): rounds, counter, key, result.
PUBLISHED = [
    (7, (0, 0, 0, 0), 0, "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, (2**32 - 1,) * 4, -1, "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (10, (0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, (2**32 - 1,) * 4, -1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (7, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def mask_bit(row, column, threshold, seed, stream):
    """One bit of the mask's definition, in Python's own integers."""
    c, key = [column // 8, row, stream, 0], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(7):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ key[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ key[1], p0 & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return (c[column % 8 // 2] >> 16 * (column % 2) & 0xFFFF) >= threshold


@pytest.mark.parametrize("rounds, counter, key, result", PUBLISHED)
def test_philox_gives_the_published_vectors(rounds, counter, key, result):
    words = reference.philox(tuple(torch.tensor(c) for c in counter), torch.tensor(key), rounds)
    assert " ".join(f"{w:08x}" for w in words.tolist()) == result


def test_the_masks_bits_are_those_of_the_first_release():
    """This table never changes: a saved seed must give the same mask in every later version."""
    table = {
        (42, 0): ["1111101010111110011110100110001001001010", "0000000110010011001101100110110101101010"],
        (42, 1): ["1111001101111001100011011110011110010100", "1010000001100111100001111111110100000101"],
        (-1, 2**32 - 1): ["1010000100101000101101011110011110110110", "0101001010111110110011000111111001011000"],
    }
    for (seed, stream), expected in table.items():
        keep = reference.keep_mask((len(expected), 40), 32768, torch.tensor(seed), stream)
        got = ["".join(str(int(bit)) for bit in row) for row in keep]
        assert got == expected


@pytest.mark.parametrize("first", [0, 2**31 - 2, 2**32 - 4])
@pytest.mark.parametrize("seed, stream", [(0, 0), (-1, 2**32 - 1), (2**62 - 12345, 2**31)])
def test_every_bit_follows_the_definition(first, seed, stream):
    keep = reference.keep_rows(first, 4, 37, 20000, torch.tensor(seed), stream)
    expected = [[mask_bit(first + i, j, 20000, seed, stream) for j in range(37)] for i in range(4)]
    assert keep.tolist() == expected


def test_rows_of_the_mask_count_over_all_leading_dimensions():
    seed = torch.tensor(5)
    assert torch.equal(
        reference.keep_mask((3, 4, 21), 9000, seed, 1).flatten(0, 1), reference.keep_mask((12, 21), 9000, seed, 1)
    )
    assert torch.equal(reference.keep_mask((), 9000, seed, 1), reference.keep_mask((1, 1), 9000, seed, 1)[0, 0])


def test_what_is_dropped_is_zero_even_where_it_was_not_finite():
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan, 1.0]]).repeat(64, 8)
    seed = torch.tensor(3)
    keep = reference.keep_mask(x.shape, 32768, seed, 0)
    y = reference.dropout(x, 32768, seed, 0)
    assert torch.equal(y[~keep], torch.zeros_like(y[~keep]))
    assert torch.allclose(y[keep], 2 * x[keep], equal_nan=True)


@pytest.mark.parametrize("threshold", [0, 20000])
def test_lora_operators_are_the_derivatives_of_the_dense_formula(threshold):
    M, K, N, r, scaling, seed = 13, 21, 17, 5, 0.7, torch.tensor(99)
    x, A, B, dY = (torch.randn(*s, dtype=torch.float64) for s in ((M, K), (r, K), (N, r), (M, N)))
    scale = reference.keep_mask((M, K), threshold, seed, 2) * (65536 / (65536 - threshold))
    for t in (x, A, B):
        t.requires_grad_()
    y = scaling * (x * scale) @ A.t() @ B.t()
    dX, dA, dB = torch.autograd.grad(y, (x, A, B), dY)
    with torch.no_grad():
        S = reference.lora_shrink(x, A, threshold, seed, 2)
        got_y, got_dX = torch.ones(M, N, dtype=torch.float64), torch.ones(M, K, dtype=torch.float64)
        reference.lora_expand_(got_y, S, B, scaling)
        dS, got_dB = reference.lora_grad_sb(dY, S, B, scaling)
        got_dA = reference.lora_grad_ax_(x, dS, A, threshold, seed, 2, got_dX)
    for got, expected in ((got_y - 1, y), (got_dX - 1, dX), (got_dA, dA), (got_dB, dB)):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("threshold", [0, 20000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_operators_that_write_the_update_first_are_the_derivatives_of_the_layer(threshold, with_bias):
    M, K, N, r, seed = 13, 21, 17, 5, torch.tensor(99)
    sizes = (M, K), (N, K), (N,), (r, K), (N, r), (M, N)
    x, W, bias, A, B, dY = (torch.randn(*size, dtype=torch.float64) for size in sizes)
    bias = bias if with_bias else None
    scale = reference.keep_mask((M, K), threshold, seed, 2) * (65536 / (65536 - threshold))
    for t in (x, A):
        t.requires_grad_()
    update = 0.7 * (x * scale) @ A.t() @ B.t()
    y = F.linear(x, W, bias) + update
    dX0, dA = torch.autograd.grad(update, (x, A), dY, retain_graph=True)
    (dX,) = torch.autograd.grad(y, x, dY)
    with torch.no_grad():
        S = reference.lora_shrink(x, A, threshold, seed, 2)
        dS, _ = reference.lora_grad_sb(dY, S, B, 0.7)
        got_dA, got_dX0 = reference.lora_grad_ax(x, dS, A, threshold, seed, 2, True)
        pairs = [
            (reference.lora_expand(S, B, bias, 0.7), update if bias is None else update + bias),
            (reference.lora_fused(x, W, bias, S, B, 0.7), y),
            (reference.lora_fused_grad(dY, W, dS, A, threshold, seed, 2), dX),
            (got_dA, dA),
            (got_dX0, dX0),
        ]
        assert reference.lora_grad_ax(x, dS, A, threshold, seed, 2, False)[1] is None
    for got, expected in pairs:
        torch.testing.assert_close(got, expected.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_narrow_tensors_are_summed_to_fp32(dtype):
    x, A, B, dY = (torch.randn(*s).to(dtype) for s in ((6, 8), (2, 8), (4, 2), (6, 4)))
    S = reference.lora_shrink(x, A, 0, torch.tensor(0), 0)
    dS, dB = reference.lora_grad_sb(dY, S, B, 0.5)
    dA = reference.lora_grad_ax_(x, dS, A, 0, torch.tensor(0), 0, None)
    assert (S.dtype, dS.dtype, dA.dtype, dB.dtype) == (dtype, dtype, torch.float32, torch.float32)
    torch.testing.assert_close(dB, 0.5 * (dY.float().t() @ S.float()), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_softmax_cross_entropy_is_torchs(softcap, weighted):
    logits = torch.randn(9, 23, dtype=torch.float64, requires_grad=True) * 4
    targets = torch.randint(23, (9,))
    weights = torch.rand(9, dtype=torch.float64) if weighted else None
    capped = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = F.cross_entropy(capped, targets, reduction="none")
    (gradient,) = torch.autograd.grad((expected * (weights if weighted else 1)).sum(), logits)
    kept, changed = logits.detach().clone(), logits.detach().clone()
    for buffer, need_grad in ((kept, False), (changed, True)):
        losses, best = reference.softmax_cross_entropy_(buffer, targets, weights, softcap, need_grad)
        torch.testing.assert_close(losses, expected.detach())
        assert torch.equal(best, capped.argmax(-1))
    assert torch.equal(kept, logits)
    torch.testing.assert_close(changed, gradient)
