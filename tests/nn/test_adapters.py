"""Several adapters on one model, against the same adapters alone and against PEFT's combinations."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from llmbuilder.errors import LLMBuilderError
from llmbuilder.nn import (
    LoRAConfig,
    LoRALinear,
    activate_adapters,
    active_adapters,
    adapters_disabled,
    add_lora,
    combine_adapters,
    deactivate_adapter,
    delete_adapter,
    list_adapters,
    merge_lora,
    save_adapter,
)

Make = Callable[[str], nn.Module]
Logits = Callable[[nn.Module], Tensor]
CONFIGS = {
    "first": LoRAConfig(rank=2, alpha=3, target_modules=["attention", "embeddings"]),
    "second": LoRAConfig(rank=2, alpha=8, target_modules=["attention", "mlp"]),
}


@pytest.fixture
def model(make: Make, shuffle: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """GPT-2 (Conv1D, fused attention, tied head) with two adapters of which the second is active."""
    model = make("gpt2")
    for name, config in CONFIGS.items():
        add_lora(model, config, name=name)
        shuffle(model)
    return model


def trainable(model: nn.Module) -> set[str]:
    return {name.split(".adapters.")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


def test_the_newest_is_active_and_trains(model: nn.Module) -> None:
    assert active_adapters(model) == {"second": 1.0}
    assert trainable(model) == {"second"}


def test_activating_chooses_what_computes_and_what_trains(model: nn.Module, logits: Logits) -> None:
    second = logits(model)
    activate_adapters(model, "first")
    first = logits(model)
    assert trainable(model) == {"first"}
    activate_adapters(model, ["first", "second"])
    both = logits(model)
    assert trainable(model) == {"first", "second"}
    assert not any(torch.equal(a, b) for a, b in ((first, second), (first, both), (second, both)))
    activate_adapters(model, {"second": 1.0, "first": 0.0}, train="second")
    assert torch.equal(logits(model), second)
    assert trainable(model) == {"second"}


def test_deactivating_all_gives_the_model_itself(model: nn.Module, make: Make, logits: Logits) -> None:
    activate_adapters(model, ["first", "second"])
    deactivate_adapter(model, "second")
    assert active_adapters(model) == {"first": 1.0}
    assert trainable(model) == {"first"}
    deactivate_adapter(model, "first")
    assert torch.equal(logits(model), logits(make("gpt2")))
    assert trainable(model) == set()


def test_inside_disabled_the_model_is_itself_and_afterwards_what_it_was(
    model: nn.Module, make: Make, logits: Logits
) -> None:
    before = logits(model)
    with pytest.raises(KeyError), adapters_disabled(model):
        assert torch.equal(logits(model), logits(make("gpt2")))
        with adapters_disabled(model):
            assert torch.equal(logits(model), logits(make("gpt2")))
        assert torch.equal(logits(model), logits(make("gpt2")))
        raise KeyError
    assert torch.equal(logits(model), before)
    assert trainable(model) == {"second"}


def test_trained_biases_come_and_go_with_their_adapter(make: Make, logits: Logits, shuffle: Callable) -> None:
    model, plain = make("phi"), logits(make("phi"))
    add_lora(model, LoRAConfig(rank=1, bias="all"), name="with")
    shuffle(model)
    tuned = logits(model)
    add_lora(model, LoRAConfig(rank=1), name="without")
    assert torch.equal(logits(model), plain)  # the new one is at zero, and the biases are the first ones
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith("bias"))
    activate_adapters(model, "with")
    assert torch.equal(logits(model), tuned)
    with adapters_disabled(model):
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), tuned)
    delete_adapter(model, "with")
    assert torch.equal(logits(model), plain)


def test_deleting_all_leaves_the_original_modules(model: nn.Module, make: Make, logits: Logits) -> None:
    delete_adapter(model, "first")
    assert list_adapters(model) == {"second": CONFIGS["second"]}
    assert isinstance(model.transformer.wte, nn.Embedding)
    assert isinstance(model.transformer.h[0].attn.c_attn, LoRALinear)
    delete_adapter(model, "second")
    plain = make("gpt2")
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert torch.equal(logits(model), logits(plain))
    assert list_adapters(model) == active_adapters(model) == {}


def test_deleting_the_active_one_keeps_what_the_others_do(model: nn.Module, logits: Logits) -> None:
    activate_adapters(model, {"first": 0.5})
    first = logits(model)
    activate_adapters(model, {"first": 0.5, "second": 2.0})
    delete_adapter(model, "second")
    assert active_adapters(model) == {"first": 0.5}
    assert torch.equal(logits(model), first)


def test_a_deleted_copy_gives_the_original_module_back(make: Make, logits: Logits, shuffle: Callable) -> None:
    model = make("llama")
    head = model.lm_head
    add_lora(model, LoRAConfig(rank=1, modules_to_save=["lm_head"]))
    shuffle(model)
    delete_adapter(model, "default")
    assert model.lm_head is head
    assert torch.equal(logits(model), logits(make("llama")))


def test_cat_is_the_weighted_sum(model: nn.Module, logits: Logits, assert_close: Callable) -> None:
    activate_adapters(model, {"first": 0.3, "second": -1.5})
    expected = logits(model)
    combine_adapters(model, "both", {"first": 0.3, "second": -1.5})
    assert active_adapters(model) == {"both": 1.0}
    assert_close(logits(model), expected)


@pytest.mark.parametrize("method", ["cat", "linear"])
def test_combinations_are_those_of_peft(
    method: str, make: Make, logits: Logits, shuffle: Callable, tmp_path: Path, assert_close: Callable
) -> None:
    model = make("llama")
    for name, alpha in (("first", 3), ("second", 8)):
        add_lora(model, LoRAConfig(rank=2, alpha=alpha, target_modules=["q_proj", "embed_tokens"]), name=name)
        save_adapter(shuffle(model), tmp_path / name)
    combine_adapters(model, "both", {"first": 0.3, "second": 1.5}, method)
    theirs = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "first", "first")
    theirs.load_adapter(tmp_path / "second", "second")
    theirs.add_weighted_adapter(["first", "second"], [0.3, 1.5], "both", combination_type=method)
    theirs.set_adapter("both")
    assert_close(logits(model), logits(theirs))


def test_a_combination_of_parts_and_wholes_adds_up(
    make: Make, logits: Logits, shuffle: Callable, assert_close: Callable
) -> None:
    model = make("gpt_neox")
    add_lora(model, LoRAConfig(rank=2, target_modules=["attention.query"]), name="part")
    shuffle(model)
    add_lora(model, LoRAConfig(rank=3, target_modules=["query_key_value"]), name="whole")
    shuffle(model)
    activate_adapters(model, ["part", "whole"])
    expected = logits(model)
    combine_adapters(model, "both", {"part": 1, "whole": 1})
    assert_close(logits(model), expected)


def test_linear_needs_equal_ranks(make: Make) -> None:
    model = make("llama")
    add_lora(model, LoRAConfig(rank=2), name="first")
    add_lora(model, LoRAConfig(rank=3), name="second")
    with pytest.raises(LLMBuilderError, match="the adapters' ranks differ; method='cat' combines them"):
        combine_adapters(model, "both", {"first": 1, "second": 1}, "linear")
    assert set(list_adapters(model)) == {"first", "second"}
    assert active_adapters(model) == {"second": 1.0}


def test_two_copies_of_one_module_are_not_active_together(make: Make) -> None:
    model = make("llama")
    for name in ("first", "second"):
        add_lora(model, LoRAConfig(rank=1, modules_to_save=["lm_head"]), name=name)
    with pytest.raises(LLMBuilderError, match="first and second both train a copy of one module"):
        activate_adapters(model, ["first", "second"])
    assert active_adapters(model) == {"second": 1.0}
    with pytest.raises(LLMBuilderError, match="can't be added up"):
        combine_adapters(model, "both", {"first": 1, "second": 1})


def test_an_unknown_name_is_answered_with_the_nearest(model: nn.Module) -> None:
    for change in (activate_adapters, deactivate_adapter, delete_adapter):
        with pytest.raises(
            LLMBuilderError, match=r"no adapter is called 'fist'; did you mean 'first'\? There are: first, second"
        ):
            change(model, "fist")
    with pytest.raises(LLMBuilderError, match="no adapter is called 'third'"):
        combine_adapters(model, "both", {"first": 1, "third": 1})
    assert active_adapters(model) == {"second": 1.0}


@pytest.mark.parametrize(
    "change",
    [
        lambda model: activate_adapters(model, "first"),
        lambda model: deactivate_adapter(model, "second"),
        lambda model: delete_adapter(model, "first"),
        lambda model: combine_adapters(model, "both", {"first": 1}),
        lambda model: adapters_disabled(model).__enter__(),
    ],
)
def test_nothing_changes_while_merged(model: nn.Module, change: Callable[[nn.Module], None]) -> None:
    merge_lora(model, untie=True)
    with pytest.raises(LLMBuilderError, match="merged into the weights"):
        change(model)


def test_a_model_without_adapters_says_how_to_get_one(make: Make) -> None:
    with pytest.raises(LLMBuilderError, match=r"LlamaForCausalLM has no adapters: add one \(add_lora\)"):
        activate_adapters(make("llama"), "first")


def test_training_what_is_not_active_is_refused(model: nn.Module) -> None:
    with pytest.raises(LLMBuilderError, match="names adapters that are not active"):
        activate_adapters(model, "first", train=["second"])
    assert active_adapters(model) == {"second": 1.0}


def test_switched_off_the_model_is_its_base_inside_one_autocast_context(make: Make) -> None:
    """Autocast remembers what it cast, and biases that an adapter trains are exchanged in place."""
    model, base = make("gpt2").eval(), make("gpt2").eval()
    add_lora(model, LoRAConfig(rank=2, bias="all"))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.autocast("cpu", torch.bfloat16):
        wanted, tuned = base(ids).logits, model(ids).logits
        with adapters_disabled(model):
            assert torch.equal(model(ids).logits, wanted)
        assert torch.equal(model(ids).logits, tuned)
    assert not torch.allclose(tuned, wanted)
