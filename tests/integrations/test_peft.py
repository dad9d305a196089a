"""PEFT's own models through the fused operator: the same numbers, and PEFT goes on working."""

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn

from llmbuilder.integrations.peft import fuse, unfuse
from llmbuilder.ops import dropout as fused_dropout
from llmbuilder.ops.dropout import seed_like

IDS = torch.randint(61, (2, 9))


def peft_model(**settings: object) -> nn.Module:
    """A tiny GPT-2 (Conv1D, fused attention) or Llama in PEFT, A and B random."""
    shape = {"vocab_size": 61, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": None}
    llama = transformers.LlamaConfig(**shape, hidden_size=32, intermediate_size=48, num_key_value_heads=2)
    model = transformers.AutoModelForCausalLM.from_config(llama)
    config = {"r": 3, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
    return randomised(peft.get_peft_model(model, peft.LoraConfig(**config)))


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model.train()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((actual[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()), name


def test_fused_gradients_are_pefts_and_unfused_ones_are_its_bits() -> None:
    model = peft_model()
    expected = gradients(model)
    done = fuse(model)
    assert len(done.layers) == 6
    assert done.left_alone == {}
    assert all("forward" in model.get_submodule(path).__dict__ for path in done.layers)
    same(gradients(model), expected)
    unfuse(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items())


def test_conv1d_layers_are_fused() -> None:
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    )
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
    base = transformers.AutoModelForCausalLM.from_config(config)
    lora = peft.LoraConfig(r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model = randomised(peft.get_peft_model(base, lora))
    expected = gradients(model)
    assert len(fuse(model).layers) == 6
    same(gradients(model), expected)


def test_the_fused_operator_is_what_runs() -> None:
    """Its dropout mask shows: the counter-based one."""
    model = peft_model(lora_dropout=0.5)
    fuse(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(4, 32)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = fused_dropout(x, 0.5, seed_like(x))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(y, layer.base_layer(x) + 4 / 3 * dropped @ A.t() @ B.t(), rtol=1e-5, atol=1e-5)
    layer.eval()
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 4 / 3 * x @ A.t() @ B.t(), rtol=1e-5, atol=1e-5)


def test_merging_disabling_and_switching_are_pefts(tmp_path: Path) -> None:
    model = peft_model()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model = randomised(model).eval()
    plain = copy.deepcopy(model)
    fuse(model)
    with torch.no_grad():
        for step in (
            lambda m: m.set_adapter("other"),
            lambda m: m.base_model.set_adapter(["default", "other"]),
            lambda m: m.merge_adapter(),
            lambda m: m.unmerge_adapter(),
            lambda m: m.set_adapter("default"),
        ):
            step(model), step(plain)
            torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)
        with model.disable_adapter(), plain.disable_adapter():
            assert torch.equal(model(IDS).logits, plain(IDS).logits)
        mixed = {"adapter_names": ["default", "__base__"]}
        assert torch.equal(model(IDS, **mixed).logits, plain(IDS, **mixed).logits)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(plain.unload(), tmp_path)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_variants_stay_pefts(settings: dict[str, bool]) -> None:
    target = {"target_modules": ["lm_head"]} if "lora_bias" in settings else {}
    model = peft_model(**settings, **target).eval()
    with torch.no_grad():
        before = model(IDS).logits
        fuse(model)
        assert torch.equal(model(IDS).logits, before)


def test_layers_of_other_kinds_are_left_alone_and_named() -> None:
    model = peft_model(target_modules=["q_proj", "embed_tokens"])
    done = fuse(model)
    assert len(done.layers) == 2
    (reason,) = done.left_alone.values()
    assert "Embedding" in reason


def test_a_deep_copy_of_a_fused_model_uses_its_own_parameters() -> None:
    model = peft_model().eval()
    fuse(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = model(IDS).logits
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        with model.disable_adapter():
            base = model(IDS).logits
        torch.testing.assert_close(twin(IDS).logits, base, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(IDS).logits, before)
