"""A LoRA layer whose update is written first: the emulated kernels under `lora_linear`, its gradients and its base."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from llmbuilder.ops import _paths, frozen_linear, lora_delta, lora_linear, reference

NARROW = [torch.float32, torch.bfloat16, torch.float16]


def layer(M, K, N, r, dtype):
    """x, weight, bias, A, B of values of order one; the adapters are fp32 masters."""
    x, weight, bias = torch.randn(M, K), torch.randn(N, K) / K**0.5, torch.randn(N)
    return *(t.to(dtype) for t in (x, weight, bias)), torch.randn(r, K) / K**0.5, torch.randn(N, r) / r**0.5


def formula(x, weight, bias, A, B, keep, p):
    """In x's dtype, adapters cast to it, by torch's own operators."""
    threshold = int(65536 * p + 0.5)
    dropped = torch.where(keep, x * (65536 / (65536 - threshold)), 0)
    update = 1.5 * (dropped @ A.to(x.dtype).t()) @ B.to(x.dtype).t()
    return update if weight is None else F.linear(x, weight, bias) + update


def gradients(function, x, A, B, dY):
    """y, dX, dA, dB."""
    x, A, B = (t.detach().clone().requires_grad_() for t in (x, A, B))
    y = function(x, A, B)
    return [y.detach(), *torch.autograd.grad(y, (x, A, B), dY.to(y.dtype))]


@settings(deadline=None, max_examples=20)
@given(
    M=st.integers(1, 20),
    K=st.sampled_from([1, 63, 64, 100]),
    N=st.sampled_from([1, 31, 64, 90]),
    r=st.sampled_from([1, 5, 16, 40]),
    p=st.sampled_from([0.0, 0.1, 0.5]),
    dtype=st.sampled_from(NARROW),
    base=st.sampled_from(["weight", "weight and bias", "none"]),
    fused=st.booleans(),
)
def test_result_and_gradients_err_no_more_than_torchs(emulator, check_error, M, K, N, r, p, dtype, base, fused):
    ways = [[], [], []]
    for _ in range(12):
        x, weight, bias, A, B = layer(M, K, N, r, dtype)
        weight, bias = None if base == "none" else weight, bias if base == "weight and bias" else None
        dY, seed = torch.randn(M, N).to(dtype), torch.randint(2**62, ())
        keep = reference.keep_mask(x.shape, int(65536 * p + 0.5), seed, 5)

        def ours(x, A, B, weight=weight, bias=bias, seed=seed):
            update = A, B, 1.5, p, seed, 5
            return lora_delta(x, *update) if weight is None else lora_linear(x, weight, bias, *update)

        def plain(x, A, B, weight=weight, bias=bias, keep=keep):
            return formula(x, *(None if t is None else t.to(x.dtype) for t in (weight, bias)), A, B, keep, p)

        with pytest.MonkeyPatch.context() as patch, emulator.serving():
            patch.setattr(_paths, "fused", lambda *_: fused)
            ways[0].append(gradients(ours, x, A, B, dY))
        ways[1].append(gradients(plain, x, A, B, dY))
        ways[2].append(gradients(plain, x.double(), A.to(dtype).double(), B.to(dtype).double(), dY))
    for i, name in enumerate(("y", "dX", "dA", "dB")):
        found, same, exact = ([draw[i] for draw in way] for way in ways)
        if fused and dtype == torch.float32:
            # One sum after the other over K errs about twice as much as torch's product, which takes several at once.
            same = [e + 2 * (s - e) for s, e in zip(same, exact, strict=True)]
        check_error(found, same, exact, name, dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("fused", [False, True])
def test_with_zero_lora_b_it_is_the_base_within_one_rounding(cuda, monkeypatch, dtype, fused):
    monkeypatch.setattr(_paths, "fused", lambda *_: fused)
    x, weight, bias, A, B = layer(70, 64, 90, 8, dtype)
    y = lora_linear(x, weight, bias, A, torch.zeros_like(B), 2.0, 0.1)
    exact = F.linear(x.double(), weight.double(), bias.double())
    base = frozen_linear(x, weight, bias)
    # one rounding to the dtype, of sums in fp32 that may be taken in another order
    unit = torch.finfo(dtype).eps * exact.abs() + 64 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert ((y.double() - exact).abs() <= unit).all()
    assert ((y.double() - base.double()).abs() <= unit).all()


def test_a_slice_of_rows_is_not_copied(cuda):
    """x is a column slice: kernels step over what lies between its rows, and read no more."""
    wide = torch.randn(20, 200).bfloat16()
    x = wide[:, 8:72]
    _, weight, _, A, B = layer(20, 64, 48, 8, torch.bfloat16)
    with cuda.recording(x=x) as launches:
        y = lora_linear(x, weight, None, A, B.requires_grad_(), 1.0)
    assert launches[0].traffic["x"].unique_read == x.numel() * 2
    with cuda.recording() as launches:
        expected = lora_linear(x.contiguous(), weight, None, A, B, 1.0)
    assert torch.equal(y, expected)


def test_rows_that_overlap_or_lie_in_columns_are_copied(cuda):
    _, weight, _, A, B = layer(6, 10, 7, 3, torch.float32)
    for x in (torch.randn(1, 10).expand(6, 10), torch.randn(10, 6).t(), torch.randn(30).as_strided((6, 10), (2, 1))):
        assert torch.equal(
            lora_linear(x, weight, None, A, B.requires_grad_(), 1.0),
            lora_linear(x.clone(memory_format=torch.contiguous_format), weight, None, A, B, 1.0),
        )


def test_no_gradient_of_x_that_nobody_wants(cuda):
    x, weight, _, A, B = layer(20, 64, 48, 8, torch.bfloat16)
    y = lora_linear(x, weight, None, A.requires_grad_(), B.requires_grad_(), 1.0, 0.1)
    with cuda.recording() as launches:
        y.sum().backward()
    written = {name: t.bytes_written for launch in launches for name, t in launch.traffic.items()}
    assert not written.get("bfloat16[20, 64]")
    assert A.grad is not None and B.grad is not None


def test_a_bias_of_any_stride(cuda):
    x, weight, bias, A, B = layer(12, 10, 7, 3, torch.float32)
    strided = torch.stack([bias, bias], 1)[:, 0]
    assert torch.equal(
        lora_linear(x, weight, strided, A, B.requires_grad_(), 1.0), lora_linear(x, weight, bias, A, B, 1.0)
    )
