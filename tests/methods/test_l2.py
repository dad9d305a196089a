"""L2-SP: the penalty on weights and on adapters against the formula, in fp64."""

import pytest
import torch
from torch import nn

from llmbuilder.methods import L2, Full, LoRA, Run
from llmbuilder.methods.l2 import drift_penalty_
from llmbuilder.models import GPT, GPTConfig
from llmbuilder.nn import LoRAConfig
from llmbuilder.nn.lora import LoRAEmbedding, LoRALinear


def gpt() -> nn.Module:
    return GPT(GPTConfig(vocab_size=31, n_layer=2, n_head=2, n_embd=16, block_size=16))


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))


def test_regularization_method_l2_is_the_drift_of_the_weights() -> None:
    model = gpt().double()
    run, method = Run(model), L2(0.3)
    Full().prepare(run)
    method.prepare(run)
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    method.before_task(run)
    assert method.penalty() == 0.0
    model.zero_grad()
    move(model)
    drift = {name: weight.detach() - start[name] for name, weight in model.named_parameters()}
    assert method.penalty() == pytest.approx(0.15 * sum(float((d**2).sum()) for d in drift.values()), rel=1e-12)
    assert all(torch.allclose(weight.grad, 0.3 * drift[name], rtol=1e-12) for name, weight in model.named_parameters())


def effective(model: nn.Module) -> list[torch.Tensor]:
    """What the adapters add to each layer's weight; differentiable."""
    return [
        update.scaling * update.matrices()[1] @ update.matrices()[0]
        for layer in model.modules()
        if isinstance(layer, LoRALinear | LoRAEmbedding)
        for update in layer.adapters.values()
    ]


@pytest.mark.parametrize("targets", ["all", ["attention.query", "embeddings"]])
def test_regularization_method_l2_under_lora_is_the_drift_of_the_effective_weight(targets: str | list[str]) -> None:
    """From an adapter that is not zero: value and gradients are those of the matrices written out."""
    model = gpt().double()
    run, method = Run(model), L2(0.7)
    LoRA(LoRAConfig(rank=3, target_modules=targets)).prepare(run)
    move(model)
    method.prepare(run)
    method.before_task(run)
    start = [delta.detach().clone() for delta in effective(model)]
    move(model)
    found = method.penalty()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    gradients = {name: weight.grad for name, weight in trained.items()}
    terms = [((now - before) ** 2).sum() for now, before in zip(effective(model), start, strict=True)]
    wanted = 0.35 * torch.stack(terms).sum()
    assert found == pytest.approx(float(wanted), rel=1e-12)
    for (name, weight), right in zip(trained.items(), torch.autograd.grad(wanted, list(trained.values())), strict=True):
        assert gradients[name] is not None
        assert torch.allclose(gradients[name], right, rtol=1e-10, atol=1e-13), (name, weight.shape)


def test_the_drift_of_fp32_adapters_is_right_where_it_is_small() -> None:
    """A drift of 10⁻⁴ of the weights: its square is 10⁻⁸ of theirs, which as a difference would be lost in fp32."""
    A0, B0 = torch.randn(4, 300), torch.randn(200, 4)
    A, B = nn.Parameter(A0 + 1e-4 * torch.randn(4, 300)), nn.Parameter(B0 + 1e-4 * torch.randn(200, 4))
    A.grad, B.grad = torch.ones(4, 300), None
    value = drift_penalty_(A, B, A0, B0, 2.0)
    exact = [t.detach().double().requires_grad_() for t in (A, B)]
    drift = exact[1] @ exact[0] - B0.double() @ A0.double()
    wanted = drift.square().sum()
    rights = torch.autograd.grad(wanted, exact)
    assert value == pytest.approx(float(wanted), rel=1e-5)
    assert B.grad is not None
    for gradient, right in ((A.grad - 1.0, rights[0]), (B.grad, rights[1])):
        assert (gradient - right).abs().max() < 1e-5 * right.abs().max() + 2**-23


def test_weights_that_do_not_train_for_now_get_no_gradient() -> None:
    model = gpt()
    run, method = Run(model), L2(1.0)
    Full().prepare(run)
    method.prepare(run)
    method.before_task(run)
    move(model)
    model.blocks[0].requires_grad_(False)
    method.penalty()
    assert all((weight.grad is not None) == weight.requires_grad for weight in model.parameters())


def test_anchors_come_back_from_a_checkpoint() -> None:
    model = gpt()
    run, method, again = Run(model), L2(1.0), L2(1.0)
    Full().prepare(run)
    method.prepare(run)
    again.prepare(run)
    method.before_task(run)
    again.load_state(method.state())
    move(model)
    assert again.penalty() == method.penalty() > 0
