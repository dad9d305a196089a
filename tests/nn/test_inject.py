"""Adding an adapter: what trains, that nothing else changes, and that an error changes nothing at all."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from llmbuilder.errors import ConfigError, LLMBuilderError
from llmbuilder.nn import LoRAConfig, LoRALinear, adapters_disabled, add_lora, list_adapters, merge_lora

Make = Callable[[str], nn.Module]
Logits = Callable[[nn.Module], Tensor]


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_logits_stay_the_same_and_only_the_adapter_trains(family: str, make: Make, logits: Logits) -> None:
    model = make(family)
    before = logits(model)
    add_lora(model, LoRAConfig(rank=2, dropout=0.1, target_modules=["attention", "mlp", "embeddings"]))
    torch.testing.assert_close(logits(model), before)
    assert trainable(model) == {
        name for name, _ in model.named_parameters() if ".lora_A." in name or ".lora_B." in name
    }
    assert len(trainable(model)) >= 2 * (2 * 6 + 1)  # two matrices in six layers of each of two blocks, one embedding


def test_trainable_names_are_those_of_the_layers() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    add_lora(model, LoRAConfig(rank=1, target_modules=["1"]), name="mine")
    assert trainable(model) == {"1.adapters.mine.lora_A.weight", "1.adapters.mine.lora_B.weight"}


def test_the_default_is_rank_16_on_the_attention(make: Make) -> None:
    model = make("llama")
    add_lora(model)
    adapted = {path for path, module in model.named_modules() if isinstance(module, LoRALinear)}
    layers = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert adapted == {f"model.layers.{i}.self_attn.{layer}" for i in range(2) for layer in layers}
    assert {len(p) for name, p in model.named_parameters() if "lora_A" in name} == {16}


@pytest.mark.parametrize(
    ("bias", "trained"), [("all", {"0.base.bias", "1.bias", "2.bias"}), ("lora_only", {"0.base.bias"})]
)
def test_biases_train_as_asked(bias: str, trained: set[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 5))
    add_lora(model, LoRAConfig(rank=1, target_modules=["0"], bias=bias))
    assert {name for name in trainable(model) if "lora_" not in name} == trained


def test_a_module_to_save_trains_as_a_copy(
    make: Make, logits: Logits, shuffle: Callable[[nn.Module], nn.Module]
) -> None:
    model = make("llama")
    before, head = logits(model), model.lm_head
    add_lora(model, LoRAConfig(rank=1, target_modules=["q_proj"], modules_to_save=["lm_head", "model.norm"]))
    assert torch.equal(logits(model), before)
    whole = {name for name in trainable(model) if "lora_" not in name}
    assert whole == {"lm_head.copies.default.weight", "model.norm.copies.default.weight"}
    shuffle(model)
    assert not torch.equal(logits(model), before)
    assert model.lm_head.weight is model.lm_head.copies["default"].weight
    with adapters_disabled(model):
        assert torch.equal(logits(model), before)
        assert model.lm_head.weight is head.weight


def test_targets_inside_a_module_to_save_are_left_out(make: Make) -> None:
    model = make("llama")
    add_lora(model, LoRAConfig(rank=1, target_modules="all", modules_to_save=["mlp"]))
    assert not any("mlp" in name and "lora_" in name for name in trainable(model))
    assert any("mlp" in name for name in trainable(model))


def test_training_and_evaluation_mode_reach_the_adapter(make: Make) -> None:
    model = make("llama")
    model.train()
    add_lora(model, LoRAConfig(rank=1, modules_to_save=["lm_head"]))
    assert all(module.training for module in model.modules())
    model.eval()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"target_modules": ["attention", "q_prj"]},
            "'q_prj' matches no layer of LlamaForCausalLM; did you mean 'q_proj'",
        ),
        ({"modules_to_save": ["lm_heed"]}, "'lm_heed' matches no module of LlamaForCausalLM; did you mean 'lm_head'"),
        ({"modules_to_save": ["layers"]}, "'model.layers' is a ModuleList"),
        ({"modules_to_save": ["mlp", "up_proj"]}, "lies inside another module of the list"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(
    settings: dict[str, list[str]], said: str, make: Make, logits: Logits
) -> None:
    model = make("llama")
    before, modules, frozen = logits(model), dict(model.named_modules()), trainable(model)
    with pytest.raises(ConfigError, match=said):
        add_lora(model, LoRAConfig(rank=1, **settings))
    assert dict(model.named_modules()) == modules
    assert trainable(model) == frozen
    assert torch.equal(logits(model), before)
    assert list_adapters(model) == {}


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training"])
def test_an_unusable_name_is_refused(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(LLMBuilderError, match="can't be the name of an adapter"):
        add_lora(model, LoRAConfig(target_modules=["0"]), name=name)
    assert isinstance(model[0], nn.Linear)


def test_a_name_that_is_taken_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    add_lora(model, LoRAConfig(rank=1, target_modules=["0"]))
    with pytest.raises(LLMBuilderError, match="has an adapter called 'default'"):
        add_lora(model, LoRAConfig(rank=1, target_modules=["1"]))
    assert isinstance(model[1], nn.Linear)


def test_a_second_adapter_shares_the_wrappers_and_trains_alone(make: Make) -> None:
    model = make("llama")
    add_lora(model, LoRAConfig(rank=1, target_modules=["q_proj"]), name="first")
    wrapped = model.model.layers[0].self_attn.q_proj
    add_lora(model, LoRAConfig(rank=2, target_modules=["q_proj", "v_proj"]), name="second")
    assert model.model.layers[0].self_attn.q_proj is wrapped
    assert set(wrapped.adapters) == {"first", "second"}
    assert isinstance(wrapped.base, nn.Linear)
    assert trainable(model) == {name for name, _ in model.named_parameters() if ".second." in name}
    assert set(list_adapters(model)) == {"first", "second"}


def test_only_one_adapter_can_train_biases() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    add_lora(model, LoRAConfig(rank=1, target_modules=["0"], bias="all"), name="first")
    with pytest.raises(ConfigError, match="the adapter 'first' trains biases, and only one can"):
        add_lora(model, LoRAConfig(rank=1, target_modules=["0"], bias="lora_only"), name="second")


def test_a_layer_carries_low_rank_adapters_or_copies_but_not_both() -> None:
    config, whole = (
        LoRAConfig(rank=1, target_modules=["0"]),
        LoRAConfig(rank=1, target_modules=["1"], modules_to_save=["0"]),
    )
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    add_lora(model, config, name="first")
    with pytest.raises(LLMBuilderError, match="'0' carries low-rank adapters already"):
        add_lora(model, whole, name="second")
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    add_lora(model, whole, name="first")
    with pytest.raises(LLMBuilderError, match="'0' is trained whole by another adapter"):
        add_lora(model, config, name="second")


def test_nothing_is_added_to_merged_adapters() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    add_lora(model, LoRAConfig(rank=1, target_modules=["0"]))
    merge_lora(model)
    with pytest.raises(LLMBuilderError, match=r"merged into the weights: call unmerge_lora\(model\) first"):
        add_lora(model, LoRAConfig(rank=1, target_modules=["0"]), name="second")


def test_a_model_that_is_itself_the_layer_is_refused() -> None:
    with pytest.raises(LLMBuilderError, match="Linear is itself the layer to wrap"):
        add_lora(nn.Linear(3, 4), LoRAConfig(rank=1, target_modules="all"))
