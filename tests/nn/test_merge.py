"""Merging: the same logits from plain weights, undone to the bit, and never behind the back of a tied weight."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from llmbuilder.errors import LLMBuilderError
from llmbuilder.models import load_model, save_model
from llmbuilder.nn import (
    LoRAConfig,
    LoRALinear,
    activate_adapters,
    adapters_disabled,
    add_lora,
    list_adapters,
    merge_lora,
    unmerge_lora,
)

Make = Callable[[str], nn.Module]
Logits = Callable[[nn.Module], Tensor]
Adapted = Callable[..., nn.Module]
EVERYTHING = LoRAConfig(rank=2, alpha=3, target_modules=["attention", "mlp", "embeddings"])


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_merged_logits_are_those_of_the_adapter_and_unmerging_restores_every_bit(
    family: str, adapted: Adapted, logits: Logits, assert_close: Callable
) -> None:
    model = adapted(family, EVERYTHING)
    before, saved = logits(model), weights(model)
    merge_lora(model, untie=True)
    assert_close(logits(model), before)
    assert any(not torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    unmerge_lora(model)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), before)


def test_merging_for_good_leaves_a_plain_model(
    family: str, adapted: Adapted, make: Make, logits: Logits, assert_close: Callable
) -> None:
    model = adapted(family, EVERYTHING)
    before = logits(model)
    merge_lora(model, keep_base=False, untie=True)
    assert_close(logits(model), before)
    plain = make(family)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert list_adapters(model) == {}
    with pytest.raises(LLMBuilderError, match="a merge with keep_base=False can't be undone"):
        unmerge_lora(model)


def test_the_merged_weight_is_the_formula_in_fp64_rounded(adapted: Adapted) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(nn.Linear(24, 40).to(dtype))
        add_lora(model, LoRAConfig(rank=3, alpha=4, target_modules=["0"]), name="a")
        add_lora(model, LoRAConfig(rank=2, alpha=4, target_modules=["0"]), name="b")
        for parameter in model[0].adapters.parameters():
            nn.init.normal_(parameter)
        activate_adapters(model, {"a": 1.0, "b": -0.5})
        exact = model[0].weight.detach().double()
        for name, factor in (("a", 4 / 3), ("b", -0.5 * 2)):
            share = model[0].adapters[name]
            exact = exact + factor * share.lora_B["weight"].detach().double() @ share.lora_A["weight"].detach().double()
        merge_lora(model)
        error = (model[0].weight.double() - exact).abs()
        sums = 4 * torch.finfo(torch.float32).eps * float(exact.abs().max())  # of three products in fp32
        assert torch.all(error <= 0.51 * torch.finfo(dtype).eps * exact.abs() + sums)


@pytest.mark.parametrize("target", ["embeddings", ["lm_head"]])
@pytest.mark.parametrize("keep_base", [True, False])
def test_a_tied_weight_is_not_merged_unless_untied(
    target: str | list[str], keep_base: bool, adapted: Adapted, logits: Logits, assert_close: Callable
) -> None:
    model = adapted("gpt2", LoRAConfig(rank=2, target_modules=target))
    before, saved = logits(model), weights(model)
    with pytest.raises(LLMBuilderError, match=r"share one weight.*untie=True makes them two"):
        merge_lora(model, keep_base=keep_base)
    assert torch.equal(logits(model), before)
    merge_lora(model, keep_base=keep_base, untie=True)
    assert_close(logits(model), before)
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    assert model.config.tie_word_embeddings is False
    if keep_base:
        unmerge_lora(model)
        assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert model.config.tie_word_embeddings is True


def test_a_trained_copy_of_a_tied_head_is_untied_only_on_request(
    adapted: Adapted, logits: Logits, assert_close: Callable
) -> None:
    model = adapted("gpt2", LoRAConfig(rank=2, modules_to_save=["lm_head"]))
    before = logits(model)
    merge_lora(model)  # the copy stays beside the head, nothing is lost
    assert_close(logits(model), before)
    unmerge_lora(model)
    with pytest.raises(LLMBuilderError, match="share one weight"):
        merge_lora(model, keep_base=False)
    merge_lora(model, keep_base=False, untie=True)
    assert type(model.lm_head) is nn.Linear
    assert_close(logits(model), before)


def test_a_model_that_is_tied_elsewhere_merges_as_usual(
    adapted: Adapted, logits: Logits, assert_close: Callable
) -> None:
    model = adapted("gpt2", LoRAConfig(rank=2))
    before = logits(model)
    merge_lora(model, keep_base=False)
    assert_close(logits(model), before)
    assert model.config.tie_word_embeddings is True


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "native"])
def test_a_merged_model_is_saved_and_loaded_like_any_other(
    name: str, adapted: Adapted, logits: Logits, tmp_path: Path
) -> None:
    model = adapted(name, EVERYTHING)
    merge_lora(model, keep_base=False, untie=True)
    save_model(model, tmp_path / "merged")
    if name == "native":
        loaded = load_model(tmp_path / "merged")
    else:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_trained_biases_stay_in_a_merged_model(
    adapted: Adapted, make: Make, logits: Logits, assert_close: Callable
) -> None:
    model = adapted("phi", LoRAConfig(rank=2, bias="all", modules_to_save=["final_layernorm"]))
    before = logits(model)
    merge_lora(model, keep_base=False)
    assert_close(logits(model), before)


def test_greedy_generation_is_the_same_merged_and_not(adapted: Adapted) -> None:
    model = adapted("llama", LoRAConfig(rank=2, target_modules="all"))
    prompt = torch.tensor([[3, 14, 15]])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    before = model.generate(prompt, **options)
    merge_lora(model)
    assert torch.equal(model.generate(prompt, **options), before)


def test_only_the_active_adapters_are_merged(adapted: Adapted, make: Make, shuffle: Callable, logits: Logits) -> None:
    model = adapted("llama", LoRAConfig(rank=2, target_modules=["q_proj"]))
    add_lora(model, LoRAConfig(rank=2, target_modules=["up_proj"]), name="other")
    shuffle(model)
    merge_lora(model, keep_base=False)
    plain = make("llama").state_dict()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, plain[name])}
    assert changed == {f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)}


def test_a_shared_layer_is_merged_once() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"first": shared, "second": shared})
    add_lora(model, LoRAConfig(rank=2, target_modules=["first"]))
    nn.init.normal_(model["first"].adapters["default"].lora_B["weight"])
    x = torch.randn(3, 8)
    before = model["second"](model["first"](x))
    merge_lora(model, keep_base=False)
    assert model["first"] is model["second"] is shared
    torch.testing.assert_close(model["second"](model["first"](x)), before, rtol=1e-4, atol=1e-4)


def test_a_second_merge_and_an_unmerge_without_one_are_refused(adapted: Adapted, make: Make) -> None:
    model = adapted("llama", LoRAConfig(rank=2))
    with pytest.raises(LLMBuilderError, match="no merged adapters"):
        unmerge_lora(model)
    merge_lora(model)
    with pytest.raises(LLMBuilderError, match="merged into the weights"):
        merge_lora(model)
    with pytest.raises(LLMBuilderError, match="has no adapters"):
        merge_lora(make("llama"))


def test_there_is_nothing_to_merge_while_adapters_are_disabled(adapted: Adapted) -> None:
    model = adapted("llama", LoRAConfig(rank=2))
    with adapters_disabled(model), pytest.raises(LLMBuilderError, match="leave adapters_disabled first"):
        merge_lora(model)
    merge_lora(model)


def test_a_model_that_moves_while_merged_unmerges_there(adapted: Adapted) -> None:
    model = adapted("llama", LoRAConfig(rank=2, target_modules=["q_proj"]))
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    merge_lora(model)
    model.to(torch.bfloat16)
    unmerge_lora(model)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, LoRALinear)
    assert torch.equal(layer.weight, before.bfloat16())
