"""The settings against forgetting: what they imply, what contradicts them, and what they do to a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmbuilder.errors import ConfigError
from llmbuilder.finetune import FineTuner, FineTuningConfig
from llmbuilder.methods import EWC, L2, Replay
from llmbuilder.nn import LoRALinear
from llmbuilder.nn.heads import LanguageHead

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("given", "method", "strength"),
    [
        ({"continual_learning": True}, "ewc", 1.0),
        ({"continual_learning": True, "regularization_strength": 1000}, "ewc", 1000.0),
        ({"continual_learning": True, "regularization_method": "l2"}, "l2", 0.01),
        ({"continual_learning": True, "memory_buffer_size": 9}, None, None),
        ({"continual_learning": True, "memory_buffer_size": 9, "regularization_strength": 2}, "ewc", 2.0),
        ({"continual_learning": True, "memory_buffer_size": 9, "preserve_base_capabilities": True}, "ewc", 1.0),
        ({"preserve_base_capabilities": True}, "l2", 0.01),
        ({"preserve_base_capabilities": True, "regularization_method": "ewc"}, "ewc", 1.0),
        ({"domain": "x"}, None, None),
        ({"domain": "x", "regularization_strength": 0.1}, "l2", 0.1),
    ],
)
def test_a_switch_implies_the_method_and_its_strength(
    given: dict[str, Any], method: str | None, strength: float | None
) -> None:
    config = FineTuningConfig(**given)
    assert (config.regularization_method, config.regularization_strength) == (method, strength)
    assert FineTuningConfig(**{k: v for k, v in config.resolved().items() if k != "lora_config"}) == config


def test_either_setting_of_replay_implies_the_other() -> None:
    one = FineTuningConfig(continual_learning=True, memory_buffer_size=9)
    other = FineTuningConfig(continual_learning=True, replay_frequency=0.4)
    assert (one.memory_buffer_size, one.replay_frequency) == (9, 0.1)
    assert (other.memory_buffer_size, other.replay_frequency) == (1000, 0.4)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"regularization_strength": 0.1}, "regularization_strength act only under"),
        ({"regularization_method": "l2"}, "regularization_method act only under"),
        ({"memory_buffer_size": 5}, "act only under continual_learning"),
        ({"replay_frequency": 0.1, "preserve_base_capabilities": True}, "act only under continual_learning"),
        ({"preserve_base_capabilities": True, "fisher": "empirical"}, "regularization_method='ewc'"),
        (
            {"continual_learning": True, "regularization_strength": 0, "fisher_decay": 0.5},
            "regularization_method='ewc'",
        ),
        (
            {"preserve_base_capabilities": True, "regularization_method": "ewc", "fisher_decay": 0.5},
            "only under continual_learning=True",
        ),
        ({"preserve_base_capabilities": True, "regularization_strength": 0}, "drop one of them"),
        ({"continual_learning": True, "multi_task": True, "task_specific_heads": True}, "one output layer"),
        ({"continual_learning": True, "multi_task": True, "shared_encoder": False}, "one adapter"),
        (
            {"continual_learning": True, "replay_frequency": 0.1, "multi_task": True, "shared_encoder": False},
            "replayed examples belong to none",
        ),
        ({"replay_frequency": 1.0, "continual_learning": True}, "replay_frequency=1.0"),
    ],
)
def test_what_cannot_mean_anything_is_refused_with_the_reason(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        FineTuningConfig(**given)


@pytest.mark.parametrize(
    "switches",
    [
        {"continual_learning": True, "preserve_base_capabilities": True},
        {"continual_learning": True, "preserve_base_capabilities": True, "domain": "x", "regularization_strength": 2},
    ],
)
def test_several_switches_add_one_penalty(
    make_gpt: Make, make_examples: Make, make_config: Make, switches: dict
) -> None:
    data = {"general_dataset": make_examples(3, seed=5)}
    tuner = FineTuner(make_gpt(), make_examples(6), make_examples(2), make_config(**switches), **data)
    assert [type(method) for method in tuner.methods._methods if hasattr(method, "penalty")] == [EWC]


def test_strength_zero_adds_no_penalty(make_gpt: Make, make_examples: Make, make_config: Make) -> None:
    config = make_config(continual_learning=True, regularization_strength=0, memory_buffer_size=4)
    tuner = FineTuner(make_gpt(), make_examples(6), make_examples(2), config)
    assert [type(method) for method in tuner.methods._methods[1:]] == [Replay]
    assert not tuner.methods.add_losses()


@torch.no_grad()
def drift(model: nn.Module, start: dict[str, torch.Tensor]) -> float:
    """How far the weights have moved; those of adapted layers effectively."""
    adapted = [layer.delta() for layer in model.modules() if isinstance(layer, LoRALinear)]
    moved = adapted or [weight - start[name] for name, weight in model.named_parameters()]
    return sum(float(delta.square().sum()) for delta in moved) ** 0.5


@pytest.mark.parametrize("method", ["ewc", "l2"])
@pytest.mark.parametrize("lora", [False, True])
def test_regularization_strength_holds_the_weights(
    make_gpt: Make, make_examples: Make, make_config: Make, method: str, lora: bool
) -> None:
    """The stronger, the less they move."""
    general = make_examples(6, seed=5)
    moved = []
    for strength in (0.0, 10.0, 1000.0):
        model = make_gpt()
        kind = {"use_lora": True, "lora_rank": 4} if lora else {}
        penalty = {"regularization_method": method, "regularization_strength": strength}
        config = make_config(continual_learning=True, num_epochs=6, max_grad_norm=1.0, **kind | penalty)
        given = {"general_dataset": general} if method == "ewc" and strength else {}
        tuner = FineTuner(model, make_examples(8), make_examples(2), config, **given)
        start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        results = tuner.train()
        assert (results.history[-1].get("extra_loss", 0.0) > 0) == (strength > 0)
        moved.append(drift(model, start))
    assert moved[0] > moved[1] > moved[2] > 0


def test_frozen_weights_stay_bit_identical_under_a_penalty_and_weight_decay(
    make_gpt: Make, make_examples: Make, make_config: Make
) -> None:
    for method in (EWC, L2):
        model = make_gpt()
        config = make_config(
            preserve_base_capabilities=True,
            regularization_method=method.name,
            freeze_layers=1,
            weight_decay=0.5,
            max_steps=3,
        )
        general = {"general_dataset": make_examples(3, seed=5)} if method is EWC else {}
        before = {name: weight.detach().clone() for name, weight in model.blocks[0].named_parameters()}
        FineTuner(model, make_examples(8), make_examples(2), config, **general).train()
        assert all(torch.equal(weight, before[name]) for name, weight in model.blocks[0].named_parameters())


@pytest.mark.parametrize("given", ["base_val_dataset", "general_dataset"])
def test_validation_on_base_tasks_reports_the_rise_of_the_loss(
    make_gpt: Make, make_examples: Make, make_config: Make, tmp_path: Path, given: str
) -> None:
    """Against the losses of the two models, computed apart."""
    base = make_examples(5, seed=9)

    def loss(model: nn.Module) -> float:
        head, total, targets = LanguageHead(model.eval()), 0.0, 0
        for example in base:
            row = {name: torch.tensor([ids]) for name, ids in example.items()}
            loss, _, count = head.score(row)
            total, targets = total + loss, targets + count
        return total / targets

    model = make_gpt()
    before = loss(model)
    config = make_config(validation_on_base_tasks=True, output_dir=tmp_path / "run")
    results = FineTuner(model, make_examples(8), make_examples(2), config, **{given: base}).train()
    assert results.forgetting == pytest.approx(loss(model) - before, abs=1e-5)
    assert abs(results.forgetting) > 1e-3
    assert f'"forgetting": {results.forgetting!r}' in (tmp_path / "run" / "results.json").read_text()


def test_without_base_data_the_base_task_is_general_text_of_its_own(
    make_gpt: Make, make_examples: Make, make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMBUILDER_CACHE", str(tmp_path))
    config = make_config(validation_on_base_tasks=True, general_tokens=64)
    with pytest.warns(UserWarning, match="sampled from the base model"):
        tuner = FineTuner(make_gpt(), make_examples(8), make_examples(2), config)
    assert tuner.train().forgetting is not None


@pytest.mark.parametrize(
    ("given", "settings", "reason"),
    [
        ("general_dataset", {}, "general_dataset has no effect"),
        ("general_dataset", {"preserve_base_capabilities": True}, "general_dataset has no effect"),
        ("base_val_dataset", {}, "base_val_dataset has no effect"),
    ],
)
def test_data_that_nothing_draws_on_are_refused(
    make_gpt: Make, make_examples: Make, make_config: Make, given: str, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        FineTuner(make_gpt(), make_examples(4), make_examples(2), make_config(**settings), **{given: make_examples(3)})
