"""The public operators with the Triton kernels behind them, interpreted, gradients too."""

import pytest
import torch

from llmbuilder import ops
from llmbuilder.ops import _backend, reference


@pytest.fixture(autouse=True)
def triton_serves(monkeypatch):
    monkeypatch.setenv("LLMBUILDER_BACKEND", "triton")


def test_triton_has_every_operator_of_its_order():
    assert all(row.backend == "triton" for row in _backend.explain("cpu"))


def test_dropout_and_its_mask():
    x, seed = torch.randn(5, 3, 41, requires_grad=True), torch.tensor(-123456789012345)
    keep = ops.dropout_mask(x.shape, 0.3, seed, 7)
    assert torch.equal(keep, reference.keep_mask(x.shape, int(65536 * 0.3 + 0.5), seed, 7))
    y = ops.dropout(x, 0.3, seed, 7)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(gradient != 0, keep) and torch.equal(y != 0, keep)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rank", [5, 40])
def test_a_lora_layer_and_its_gradients(p, rank):
    seed, dY = torch.tensor(3), torch.randn(2, 20, 50)
    x, weight, bias = torch.randn(2, 20, 63), torch.randn(50, 63) / 8, torch.randn(50)
    A, B = torch.randn(rank, 63) / 8, torch.randn(50, rank) / rank**0.5
    keep, scale = ops.dropout_mask(x.shape, p, seed, 4), 65536 / (65536 - int(65536 * p + 0.5))

    def gradients(function, *tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dY.to(y.dtype))]

    def formula(x, A, B):
        base = torch.nn.functional.linear(x, weight.double(), bias.double())
        return base + 1.5 * (torch.where(keep, x * scale, 0) @ A.t()) @ B.t()

    def ours(x, A, B):
        return ops.lora_linear(x, weight, bias, A, B, 1.5, p, seed, 4)

    exact = gradients(formula, x.double(), A.double(), B.double())
    for name, got, expected in zip(("y", "dx", "dA", "dB"), gradients(ours, x, A, B), exact, strict=True):
        torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_cross_entropy_of_a_linear_layer():
    x, weight, targets = torch.randn(9, 20), torch.randn(300, 20), torch.randint(300, (9,))
    targets[4] = -100
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    exact = [t.double().requires_grad_() for t in (x, weight)]
    loss = ops.linear_cross_entropy(*leaves, targets)
    truth = torch.nn.functional.cross_entropy(exact[0] @ exact[1].t(), targets)
    torch.testing.assert_close(loss, truth.float())
    for got, expected in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, exact), strict=True):
        torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-5)
