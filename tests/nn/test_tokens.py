"""Rows of tokens that an adapter trains: what they compute, that nothing else moves, and the way to PEFT and back."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from llmbuilder.errors import ConfigError, LLMBuilderError
from llmbuilder.models import load_model, save_model
from llmbuilder.nn import (
    LoRAConfig,
    activate_adapters,
    adapters_disabled,
    add_lora,
    combine_adapters,
    delete_adapter,
    load_adapter,
    merge_lora,
    save_adapter,
    unmerge_lora,
)

IDS = torch.tensor([[1, 58, 60, 3, 58]])


def make_model(tied: bool) -> Any:
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**shape, num_attention_heads=4, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config).eval()


def moved(model: Any) -> Any:
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight))
    return model


def adapted(base: Any, name: str = "default") -> Any:
    """A copy with an adapter and two rows of tokens, all of it far from its start."""
    model = copy.deepcopy(base)
    add_lora(model, LoRAConfig(rank=2, target_modules=["q_proj"], trainable_token_indices=[58, 60]), name)
    return moved(model)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


def test_the_rows_replace_the_tables_own_and_no_other_weight_trains(tied: bool) -> None:
    base = make_model(tied)
    model = copy.deepcopy(base)
    add_lora(model, LoRAConfig(rank=2, target_modules=["q_proj"], trainable_token_indices=[58, 60]))
    torch.testing.assert_close(model(IDS).logits, base(IDS).logits)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    rows = [weight for name, weight in trained.items() if "lora_" not in name]
    assert [tuple(weight.shape) for weight in rows] == [(2, 32)] * (1 if tied else 2)
    moved(model)
    plain = copy.deepcopy(base)
    with torch.no_grad():
        plain.model.embed_tokens.weight[[58, 60]] = rows[0]
        plain.lm_head.weight[[58, 60]] = rows[-1]
        query = plain.model.layers[0].self_attn.q_proj
        query.weight += model.model.layers[0].self_attn.q_proj.delta()
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)
    with adapters_disabled(model):
        assert torch.equal(model(IDS).logits, base(IDS).logits)


def test_gradients_are_those_of_the_rows_of_a_whole_table(tied: bool) -> None:
    base = make_model(tied)
    model = copy.deepcopy(base)
    add_lora(model, LoRAConfig(rank=2, target_modules=["q_proj"], trainable_token_indices=[58, 60]))
    loss = lambda logits: logits.log_softmax(-1)[..., 7].sum()  # noqa: E731
    loss(model(IDS).logits).backward()
    loss(base(IDS).logits).backward()
    rows = [weight for name, weight in model.named_parameters() if name.endswith(".rows")]
    tables = [base.model.embed_tokens.weight] if tied else [base.model.embed_tokens.weight, base.lm_head.weight]
    for row, table in zip(rows, tables, strict=True):
        torch.testing.assert_close(row.grad, table.grad[[58, 60]])
        assert row.grad.abs().max() > 0


def test_rows_travel_to_peft_and_back(tied: bool, tmp_path: Path) -> None:
    base = make_model(tied)
    ours = adapted(base)
    save_adapter(ours, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(read(IDS).logits, ours(IDS).logits)
    assert not torch.allclose(base(IDS).logits, ours(IDS).logits)

    spec = [58, 60] if tied else {"embed_tokens": [58, 60], "lm_head": [58, 60]}
    options = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=spec, task_type="CAUSAL_LM")
    theirs = moved(peft.get_peft_model(copy.deepcopy(base), options).eval())
    theirs.save_pretrained(tmp_path / "theirs")
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(again(IDS).logits, theirs(IDS).logits)


def test_a_merged_model_is_plain_and_keeps_its_tie(tied: bool, tmp_path: Path) -> None:
    base = make_model(tied)
    model = adapted(base)
    wanted, state = model(IDS).logits, copy.deepcopy(model.state_dict())
    merge_lora(model)
    torch.testing.assert_close(model(IDS).logits, wanted)
    unmerge_lora(model)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    merge_lora(model, keep_base=False)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert type(model.lm_head) is torch.nn.Linear
    torch.testing.assert_close(model(IDS).logits, wanted)


def test_a_native_model_merges_saves_and_grows(tmp_path: Path) -> None:
    from llmbuilder.models import GPT, GPTConfig
    from llmbuilder.models.vocabulary import grow_vocabulary

    model: Any = GPT(GPTConfig(vocab_size=20, n_layer=1, n_head=2, n_embd=16, block_size=8)).eval()
    grow_vocabulary(model, 23)
    add_lora(model, LoRAConfig(rank=2, trainable_token_indices=[20, 22]))
    moved(model)
    ids = torch.tensor([[1, 20, 22]])
    wanted = model(ids).logits
    merge_lora(model, keep_base=False)
    assert model.head.weight is model.embedding.weight
    save_model(model, tmp_path / "model.pt")
    torch.testing.assert_close(load_model(tmp_path / "model.pt")(ids).logits, wanted)


def test_one_adapter_at_a_time_has_rows_and_deleting_it_leaves_the_layers_as_they_were() -> None:
    base = make_model(True)
    model = adapted(base, "first")
    add_lora(model, LoRAConfig(rank=2, target_modules=["q_proj"], trainable_token_indices=[5]), "second")
    moved(model)
    with pytest.raises(LLMBuilderError, match="both train a copy of one module or rows of it"):
        activate_adapters(model, ["first", "second"])
    with pytest.raises(LLMBuilderError, match="train biases, tokens or whole modules"):
        combine_adapters(model, "sum", {"first": 1.0, "second": 1.0})
    for name in ("first", "second"):
        delete_adapter(model, name)
    assert type(model.lm_head) is torch.nn.Linear
    assert torch.equal(model(IDS).logits, base(IDS).logits)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    model = make_model(False)
    for config, told in (
        (LoRAConfig(trainable_token_indices=[61]), "has 61 rows, and 61 is none of them"),
        (LoRAConfig(trainable_token_indices=[3], modules_to_save=["lm_head"]), "carries other adapters"),
        (LoRAConfig(trainable_token_indices=[3], target_modules=["embeddings"]), "carries other adapters"),
    ):
        with pytest.raises((ConfigError, LLMBuilderError), match=told):
            add_lora(model, config)
        assert not any("lora" in name or "base" in name for name, _ in model.named_parameters())
    with pytest.raises(ConfigError, match="trainable_token_indices"):
        LoRAConfig(trainable_token_indices=[-1])
