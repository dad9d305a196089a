"""Groups, torch's own results, and a state that survives by name."""

import pytest
import torch
from torch import nn

from llmbuilder.finetune.config import FineTuningConfig
from llmbuilder.finetune.optimizer import (
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_rate,
    trained_parameters,
)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.linear = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
        self.frozen = nn.Linear(2, 2)
        self.frozen.requires_grad_(False)
        self.tied = self.linear


def draw_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in trained_parameters(model).values():
        weight.grad = torch.randn(weight.shape, generator=generator)


def test_norms_and_biases_do_not_decay() -> None:
    model = Small()
    trained = trained_parameters(model)
    assert sorted(trained) == ["embedding.weight", "linear.bias", "linear.weight", "norm.bias", "norm.weight"]
    names = {id(weight): name for name, weight in trained.items()}
    groups = {
        group["weight_decay"]: sorted(names[id(weight)] for weight in group["params"])
        for group in make_optimizer(FineTuningConfig(weight_decay=0.3), trained).param_groups
    }
    assert groups == {
        0.3: ["embedding.weight", "linear.weight"],
        0.0: ["linear.bias", "norm.bias", "norm.weight"],
    }


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weights_after_three_steps_are_those_of_the_formula(name: str) -> None:
    torch.manual_seed(1)
    model = Small()
    trained = trained_parameters(model)
    optimizer = make_optimizer(FineTuningConfig(optimizer=name, weight_decay=0.1), trained)
    wanted = {key: weight.detach().double() for key, weight in trained.items()}
    first = {key: torch.zeros_like(weight) for key, weight in wanted.items()}
    second = {key: torch.zeros_like(weight) for key, weight in wanted.items()}
    for step, rate in enumerate((0.1, 0.02, 0.05), start=1):
        draw_gradients(model, step)
        set_rate(optimizer, rate)
        for key, weight in trained.items():
            decay, gradient = 0.1 * (weight.dim() > 1), weight.grad.double()
            if name == "sgd":
                wanted[key] = wanted[key] - rate * (gradient + decay * wanted[key])
                continue
            first[key] = 0.9 * first[key] + 0.1 * gradient
            second[key] = 0.999 * second[key] + 0.001 * gradient**2
            update = (first[key] / (1 - 0.9**step)) / ((second[key] / (1 - 0.999**step)).sqrt() + 1e-8)
            wanted[key] = wanted[key] * (1 - rate * decay) - rate * update
        optimizer.step()
    for key, weight in trained.items():
        torch.testing.assert_close(weight.double(), wanted[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_reloaded_state_goes_on_bit_for_bit(name: str) -> None:
    torch.manual_seed(2)
    one, other = Small(), Small()
    config = FineTuningConfig(optimizer=name)
    optimizer = make_optimizer(config, trained_parameters(one))
    for seed in range(2):
        draw_gradients(one, seed)
        optimizer.step()
    other.load_state_dict(one.state_dict())
    again = make_optimizer(config, trained_parameters(other))
    saved = {key: value.clone() for key, value in optimizer_tensors(optimizer, trained_parameters(one)).items()}
    load_optimizer_tensors(again, trained_parameters(other), saved)
    for model, update in ((one, optimizer), (other, again)):
        draw_gradients(model, 7)
        update.step()
    for key, weight in trained_parameters(one).items():
        assert torch.equal(weight, trained_parameters(other)[key])
    if name == "adamw":
        assert {key.split("/")[0] for key in saved} == {"exp_avg", "exp_avg_sq", "step"}
        assert all(
            not torch.equal(saved[key], value)
            for key, value in optimizer_tensors(again, trained_parameters(other)).items()
        )


def test_a_weight_without_a_gradient_is_neither_moved_nor_decayed_and_has_no_state() -> None:
    model = Small()
    trained = trained_parameters(model)
    before = {key: weight.detach().clone() for key, weight in trained.items()}
    optimizer = make_optimizer(FineTuningConfig(weight_decay=0.5, learning_rate=0.1), trained)
    draw_gradients(model, 0)
    model.embedding.weight.grad = None
    optimizer.step()
    assert torch.equal(model.embedding.weight, before["embedding.weight"])
    assert not torch.equal(model.linear.weight, before["linear.weight"])
    assert not any(key.endswith("embedding.weight") for key in optimizer_tensors(optimizer, trained))
