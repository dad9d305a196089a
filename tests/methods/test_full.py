"""Full fine-tuning: everything trains, every dropout gets the rate."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from llmbuilder.methods import Full, Run
from llmbuilder.models import GPT, GPTConfig

IDS = torch.arange(12).reshape(2, 6)


def gpt() -> nn.Module:
    return GPT(GPTConfig(vocab_size=31, n_layer=2, n_head=2, n_embd=16, block_size=16))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def neox() -> nn.Module:
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=31, max_position_embeddings=16, **shape))


def llama() -> nn.Module:
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=31, max_position_embeddings=16, **shape))


def test_every_parameter_trains() -> None:
    model = gpt()
    model.requires_grad_(False)
    Full().prepare(Run(model))
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("make", [gpt, gpt2, neox])
def test_outputs_differ_in_training_only(make: type[nn.Module]) -> None:
    model = make()
    Full(0.5).prepare(Run(model))
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.5}
    with torch.no_grad():
        assert not torch.equal(model.train()(input_ids=IDS).logits, model(input_ids=IDS).logits)
        assert torch.equal(model.eval()(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_rate_of_zero_turns_the_models_own_dropout_off() -> None:
    model = gpt2()
    with torch.no_grad():
        assert not torch.equal(model.train()(input_ids=IDS).logits, model(input_ids=IDS).logits)
        Full(0.0).prepare(Run(model))
        assert torch.equal(model.train()(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_no_rate_leaves_the_models_own() -> None:
    model = gpt2()
    Full().prepare(Run(model))
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.1}


def test_a_model_with_attention_dropout_only_is_named_and_gets_that() -> None:
    model = llama()
    with pytest.warns(
        UserWarning, match="LlamaForCausalLM has no dropout layer: dropout_rate=0.5 acts on its attention"
    ):
        Full(0.5).prepare(Run(model))
    with torch.no_grad():
        assert not torch.equal(model.train()(input_ids=IDS).logits, model(input_ids=IDS).logits)
        assert torch.equal(model.eval()(input_ids=IDS).logits, model(input_ids=IDS).logits)
