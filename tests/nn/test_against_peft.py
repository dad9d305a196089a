"""The same adapters in PEFT and here, from random A and B: the same gradients, and the same course of training."""

from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn

from llmbuilder.nn import LoRAConfig, add_lora

Make = Callable[[str], nn.Module]
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Whole layers, by names that both understand; PEFT has no parts of fused ones.
TARGETS = {
    **dict.fromkeys(["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3"], LLAMA),
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "phi": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}
SETTINGS = {"use_rslora": True, "bias": "lora_only"}


def twins(name: str, make: Make, shuffle: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """The same model twice, with the same random A and B: ours and PEFT's."""
    ours, theirs = make(name), make(name)
    add_lora(ours, LoRAConfig(rank=4, alpha=6, target_modules=TARGETS[name], **SETTINGS))
    shuffle(ours)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[name], fan_in_fan_out=name == "gpt2", **SETTINGS)
    theirs = peft.get_peft_model(theirs, config)
    pairs = trained_pairs(ours, theirs)
    assert len(pairs) == sum(parameter.requires_grad for parameter in theirs.parameters())
    with torch.no_grad():
        for mine, its in pairs.values():
            its.copy_(mine)
    return ours.train(), theirs.train()


def trained_pairs(ours: nn.Module, theirs: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Every parameter that trains here, and what PEFT calls it."""
    named = dict(theirs.named_parameters())
    pairs = {}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            path, _, matrix = name.partition(".adapters.default.")
            there = f"{path}.{matrix.replace('.', '.default.')}" if matrix else name.replace(".base.", ".base_layer.")
            pairs[name] = parameter, named[f"base_model.model.{there}"]
    return pairs


def batches(n: int) -> list[Tensor]:
    return [torch.randint(61, (4, 12)) for _ in range(n)]


@pytest.mark.parametrize("name", TARGETS)
def test_the_gradients_of_the_first_step_are_pefts(name: str, make: Make, shuffle: Callable) -> None:
    ours, theirs = twins(name, make, shuffle)
    (ids,) = batches(1)
    for model in (ours, theirs):
        model(input_ids=ids, labels=ids).loss.backward()
    for parameter, (mine, its) in trained_pairs(ours, theirs).items():
        distance = float((mine.grad.double() - its.grad.double()).norm() / its.grad.double().norm())
        assert distance <= 1e-5, f"{parameter}: {distance}"


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("name", TARGETS)
def test_twenty_losses_are_pefts(name: str, optimizer: type, make: Make, shuffle: Callable) -> None:
    data, courses = batches(20), []
    for model in twins(name, make, shuffle):
        steps = optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for ids in data:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            steps.step()
            steps.zero_grad()
            losses.append(loss.item())
        courses.append(torch.tensor(losses, dtype=torch.float64))
    mine, its = courses
    assert float(its.std()) > 0
    assert float(((mine - its) / its).abs().max()) <= 1e-5
