"""Styles on attention alone, and facts that stay where they are stored."""

import warnings
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from llmbuilder.errors import ConfigError
from llmbuilder.finetune import FineTuningConfig
from llmbuilder.methods import FactualKnowledge, Full, LoRA, Run
from llmbuilder.nn import LoRAConfig

pytestmark = pytest.mark.filterwarnings("ignore:no validation data")
SHAPE = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"intermediate_size": 32, "max_position_embeddings": 16}


def trained(model: Any) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_style_adaptation_trains_adapters_on_attention_only(make_gpt: Any, make_rows: Any, tune: Any) -> None:
    model = make_gpt()
    tuner = tune(model, make_rows(8), style_adaptation=True, lora_rank=2)
    assert tuner.config.use_lora
    names = trained(model)
    assert names and all("lora_" in name and ".attention." in name for name in names)
    assert {name.split(".")[3] for name in names} == {"query", "key", "value", "output"}
    narrower = tune(make_gpt(), make_rows(8), style_adaptation=True, target_modules=["attention.query"])
    assert {name.split(".")[3] for name in trained(narrower.model)} == {"query"}


@pytest.mark.parametrize("use_lora", [True, False])
def test_preserve_factual_knowledge_keeps_feed_forward_layers_bit_identical(
    make_gpt: Any, make_rows: Any, tune: Any, weights: Any, use_lora: bool
) -> None:
    """Whatever the targets, and under weight decay; an adapter that is there stays without effect."""
    settings = {"target_modules": "all", "lora_rank": 2} if use_lora else {"use_lora": False}
    model = make_gpt()
    before = weights(model)
    tuner = tune(model, make_rows(12), preserve_factual_knowledge=True, weight_decay=0.5, **settings)
    after = {name.replace(".base.", "."): weight for name, weight in weights(tuner.model).items()}
    facts = [name for name in before if ".mlp." in name]
    assert len(facts) == 6 and all(torch.equal(before[name], after[name]) for name in facts)
    adapters = [after[name] for name in after if ".mlp." in name and "lora_B" in name]
    assert len(adapters) == (6 if use_lora else 0) and not any(B.any() for B in adapters)
    moved = "lora_B" if use_lora else "attention.query.weight"
    others = [name for name in after if moved in name and ".attention." in name]
    assert others and all(not torch.equal(after[n], before.get(n, torch.zeros_like(after[n]))) for n in others)


@pytest.mark.parametrize("whole", [["mlp"], ["mlp.up", "norm"]], ids=str)
def test_facts_are_kept_in_copies_that_an_adapter_has_of_modules(
    make_gpt: Any, make_rows: Any, tune: Any, whole: list[str]
) -> None:
    model = make_gpt()
    x = torch.randn(3, 16)
    before = [block.mlp(x) for block in model.blocks]
    config = {"modules_to_save": whole, "target_modules": "attention"}
    tuner = tune(model, make_rows(12), preserve_factual_knowledge=True, use_lora=True, lora_config=config)
    assert all(torch.equal(block.mlp(x), y) for block, y in zip(tuner.model.blocks, before, strict=True))
    assert any("norm" in name for name in trained(model)) == ("norm" in whole)


@pytest.mark.parametrize(
    ("model", "facts"),
    [
        (
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2)),
            {"mlp.c_fc", "mlp.c_proj"},
        ),
        (
            lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
            {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
        ),
        (
            lambda: OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=32, word_embed_proj_dim=16)),
            {"fc1", "fc2"},
        ),
        (
            lambda: Phi3ForCausalLM(Phi3Config(**SHAPE, pad_token_id=0)),
            {"mlp.gate_up_proj", "mlp.down_proj"},
        ),
    ],
)
def test_feed_forward_layers_are_found_in_every_family(model: Any, facts: set[str]) -> None:
    full, adapted = model(), model()
    for method in (Full(), FactualKnowledge()):
        method.prepare(Run(full))
    frozen = {name for name, _ in full.named_parameters()} - trained(full)
    assert {".".join(name.split(".")[-3:-1]) if "mlp" in name else name.split(".")[-2] for name in frozen} == facts
    for method in (LoRA(LoRAConfig(rank=2, target_modules="all")), FactualKnowledge()):
        method.prepare(Run(adapted))
    assert trained(adapted) and not any(f".{fact}." in name for name in trained(adapted) for fact in facts)


@pytest.mark.parametrize("use_lora", [True, False])
def test_of_a_mixture_experts_and_router_stay_as_they_are(make_rows: Any, tune: Any, use_lora: bool) -> None:
    model = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **SHAPE,
            num_key_value_heads=2,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
            num_experts=4,
        )
    )
    before = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    settings = {"target_modules": "all", "lora_rank": 2} if use_lora else {}
    tune(model, make_rows(8), preserve_factual_knowledge=True, use_lora=use_lora, weight_decay=0.5, **settings)
    after = {name.replace(".base.", "."): weight for name, weight in model.state_dict().items()}
    facts = [name for name in before if ".mlp." in name]
    assert len(facts) == 2 * 7 and all(torch.equal(before[name], after[name]) for name in facts)
    assert not any(".mlp." in name for name in trained(model)) and any("attn" in name for name in trained(model))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"style_adaptation": True}, "style_adaptation trains attention layers, which are not found: .* of MambaForC"),
        (
            {"preserve_factual_knowledge": True},
            "preserve_factual_knowledge: the feed-forward layers of MambaForCausalLM",
        ),
    ],
)
def test_an_architecture_without_such_layers_is_refused_by_the_settings_name(
    make_rows: Any, tune: Any, settings: dict[str, Any], told: str
) -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ConfigError, match=told):
        tune(model, make_rows(4), **settings)


def test_together_the_one_is_said_to_imply_the_other(make_gpt: Any, make_rows: Any, tune: Any) -> None:
    with pytest.warns(UserWarning, match="preserve_factual_knowledge is implied"):
        tune(make_gpt(), make_rows(8), style_adaptation=True, preserve_factual_knowledge=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "no validation data")
        tune(make_gpt(), make_rows(8), style_adaptation=True)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"style_adaptation": True, "use_lora": False}, "use_lora=False forbids"),
        ({"style_adaptation": True, "target_modules": "all"}, "trains attention only, and target_modules='all'"),
        ({"style_adaptation": True, "lora_config": {"modules_to_save": ["mlp"]}}, "modules_to_save would train more"),
        ({"style_adaptation": True, "lora_config": {"bias": "all"}}, "bias would train more"),
        ({"preserve_factual_knowledge": True, "target_modules": ["mlp"]}, "leaves .* nothing to train"),
    ],
)
def test_what_contradicts_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        FineTuningConfig(**settings)
