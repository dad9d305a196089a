"""Which parameters freezing takes, and what it says."""

import warnings

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from llmbuilder.errors import ConfigError
from llmbuilder.methods import Freeze, Full, LoRA, Run
from llmbuilder.models import GPT, GPTConfig
from llmbuilder.nn import LoRAConfig


def gpt(tie: bool = True) -> nn.Module:
    return GPT(GPTConfig(vocab_size=31, n_layer=3, n_head=2, n_embd=16, block_size=16, tie_word_embeddings=tie))


def frozen(model: nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters() if not weight.requires_grad}


def test_the_lowest_blocks_freeze_and_the_embeddings_do_not() -> None:
    model = gpt()
    for method in (Full(), Freeze(layers=2)):
        method.prepare(Run(model))
    assert frozen(model) == {
        name for name, _ in model.named_parameters() if name.startswith(("blocks.0.", "blocks.1."))
    }


def test_embeddings_include_those_of_positions_and_the_tied_head_which_is_said() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    Full().prepare(Run(model))
    with pytest.warns(UserWarning, match="freezes the output head too: the two share one weight"):
        Freeze(embeddings=True).prepare(Run(model))
    assert frozen(model) == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert not model.lm_head.weight.requires_grad


def test_a_head_of_its_own_goes_on_training_and_nothing_is_said() -> None:
    model = gpt(tie=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in (Full(), Freeze(embeddings=True)):
            method.prepare(Run(model))
    assert frozen(model) == {"embedding.weight"}


def test_under_lora_frozen_blocks_train_no_adapter() -> None:
    model = gpt()
    for method in (LoRA(LoRAConfig(rank=2, target_modules="all")), Freeze(layers=2, embeddings=True)):
        method.prepare(Run(model))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all(name.startswith("blocks.2.") and "lora_" in name for name in trained)


def test_more_layers_than_there_are_is_an_error() -> None:
    with pytest.raises(ConfigError, match="freeze_layers=4: GPT has 3 blocks"):
        Freeze(layers=4).prepare(Run(gpt()))
    model = gpt()
    Freeze(layers=3).prepare(Run(model))
    assert torch.tensor([not weight.requires_grad for weight in model.blocks.parameters()]).all()
