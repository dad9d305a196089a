"""torch's default dtype and device, which programs set to load models, are no operator's: results are the same bits."""

import pytest
import torch

from llmbuilder import ops
from llmbuilder.ops import _gemm


@pytest.fixture(params=[torch.bfloat16, torch.float64, torch.device("meta")], ids=str)
def other_default(request):
    """Calls a function where the default is another one."""

    def call(function):
        if isinstance(request.param, torch.device):
            with request.param:
                return function()
        torch.set_default_dtype(request.param)
        try:
            return function()
        finally:
            torch.set_default_dtype(torch.float32)

    return call


def same(found, expected):
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("rank", [5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_layer(other_default, dtype, rank):
    x, weight, dY = torch.randn(30, 40).to(dtype), torch.randn(50, 40).to(dtype), torch.randn(30, 50).to(dtype)
    A, B, seed = torch.randn(rank, 40), torch.randn(50, rank), torch.tensor(5)

    def results():
        leaves = [t.clone().requires_grad_() for t in (x, A, B)]
        y = ops.lora_linear(leaves[0], weight, None, *leaves[1:], 1.5, 0.1, seed)
        return [y.detach(), *torch.autograd.grad(y, leaves, dY)]

    same(other_default(results), results())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy(other_default, dtype):
    x, weight, targets = torch.randn(9, 16).to(dtype), torch.randn(33, 16).to(dtype), torch.arange(9)

    def results():
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        losses = ops.linear_cross_entropy(*leaves, targets, reduction="none")
        return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves)]

    same(other_default(results), results())


def test_ewc(other_default):
    params, anchors, fishers = ([torch.randn(70), torch.randn(3).bfloat16()] for _ in range(3))

    def results():
        for param in params:
            param.grad = None
        assert ops.ewc_penalty([], [], None, 1.0).dtype == torch.float32
        value = ops.ewc_penalty_(params, anchors, fishers, 0.5)
        return [value, ops.ewc_penalty(params, anchors, fishers, 0.5), *(param.grad for param in params)]

    same(other_default(results), results())


def test_the_choice_of_the_frozen_product(other_default):
    _gemm.onednn_is_precise.cache_clear()
    found = other_default(_gemm.onednn_is_precise)
    _gemm.onednn_is_precise.cache_clear()
    assert found == _gemm.onednn_is_precise()
