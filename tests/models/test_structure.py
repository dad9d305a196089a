"""Blocks, embeddings, head and ties are found in every family."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from llmbuilder.models import GPT, blocks, context_length, embeddings, head, tie_groups

STACKS = {
    "llama": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
    "mistral": "model.layers",
    "gemma": "model.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "phi": "model.layers",
}
EMBEDDINGS = {"gpt2": ["transformer.wte", "transformer.wpe"], "gpt_neox": ["gpt_neox.embed_in"]}
TIED = {
    "qwen2": [["model.embed_tokens.weight", "lm_head.weight"]],
    "gemma": [["model.embed_tokens.weight", "lm_head.weight"]],
    "gpt2": [["transformer.wte.weight", "lm_head.weight"]],
}


@pytest.mark.parametrize("name", STACKS)
def test_the_parts_of_each_family(make_family: Callable[[str], nn.Module], name: str) -> None:
    model = make_family(name)
    assert [place for place, _ in blocks(model)] == [f"{STACKS[name]}.0", f"{STACKS[name]}.1"]
    assert all(module is model.get_submodule(place) for place, module in blocks(model))
    assert [place for place, _ in embeddings(model)] == EMBEDDINGS.get(name, ["model.embed_tokens"])
    assert head(model) is model.lm_head
    assert tie_groups(model) == TIED.get(name, [])
    assert context_length(model) == 64


def test_blocks_come_in_the_order_in_which_they_run(family: nn.Module) -> None:
    ran: list[str] = []
    for name, block in blocks(family):
        block.register_forward_hook(lambda *_, name=name: ran.append(name))
    family(torch.tensor([[1, 2, 3]]))
    assert ran == [name for name, _ in blocks(family)]


def test_the_native_model(gpt: GPT) -> None:
    assert [name for name, _ in blocks(gpt)] == ["blocks.0", "blocks.1"]
    assert embeddings(gpt) == [("embedding", gpt.embedding)]
    assert head(gpt) is gpt.head
    assert tie_groups(gpt) == [["embedding.weight", "head.weight"]]
    assert context_length(gpt) == 64


def test_experts_within_a_block_are_not_blocks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))

    model = nn.Module()
    model.tower = nn.ModuleList(Block() for _ in range(3))
    model.adapters = nn.ModuleList([nn.Linear(2, 2)])
    assert [name for name, _ in blocks(model)] == ["tower.0", "tower.1", "tower.2"]


def test_a_model_without_a_stack_has_no_blocks() -> None:
    assert blocks(nn.Linear(2, 2)) == [] and embeddings(nn.Linear(2, 2)) == [] and tie_groups(nn.Linear(2, 2)) == []


def test_a_tie_under_three_names_is_one_group() -> None:
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    layers[2].weight = layers[3].weight = layers[0].weight
    assert tie_groups(layers) == [["0.weight", "2.weight", "3.weight"]]


def test_a_config_without_a_length_has_none() -> None:
    model = nn.Linear(2, 2)
    model.config = object()
    assert context_length(model) is None
