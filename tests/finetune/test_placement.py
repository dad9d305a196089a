"""dtypes, devices, alignment, checkpointing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig

from llmbuilder.errors import ConfigError
from llmbuilder.finetune import FineTuner
from llmbuilder.finetune.placement import enable_checkpointing, place, use_bf16


def dtypes(model: nn.Module) -> dict[bool, set[torch.dtype]]:
    found: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for weight in model.parameters():
        found[weight.requires_grad].add(weight.dtype)
    return found


@pytest.mark.parametrize(
    ("stored", "dtype", "frozen", "autocast"),
    [
        (torch.float32, "auto", torch.float32, False),
        (torch.bfloat16, "auto", torch.bfloat16, True),
        (torch.float32, "bf16", torch.bfloat16, True),
        (torch.bfloat16, "fp32", torch.float32, False),
        (torch.float16, "auto", torch.float32, False),
    ],
)
def test_trained_weights_are_fp32_and_frozen_ones_as_the_run_says(
    make_gpt: Callable[..., nn.Module],
    make_config: Callable[..., Any],
    stored: torch.dtype,
    dtype: str,
    frozen: torch.dtype,
    autocast: bool,
) -> None:
    model = make_gpt().to(stored)
    model.requires_grad_(False)
    model.blocks[1].requires_grad_(True)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    assert use_bf16(model, make_config(dtype=dtype)) is autocast
    assert dtypes(model) == {True: {torch.float32}, False: {frozen}}
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name].to(weight.dtype))
    assert model.head.weight is model.embedding.weight


@pytest.mark.filterwarnings("ignore:no validation data")
@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None),
        GPTNeoXConfig(vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2),
    ],
    ids=["gpt2", "gpt_neox"],
)
def test_biases_train_beside_a_bf16_base_that_has_norms(config: Any, make_examples: Any, make_config: Any) -> None:
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    settings = make_config(use_lora=True, lora_config={"bias": "all"}, lora_rank=2, dtype="auto")
    tuner = FineTuner(model, make_examples(8), config=settings)
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 5
    for norm in norms:
        assert norm.weight.dtype == norm.bias.dtype == torch.float32
        assert norm.bias.requires_grad and not norm.weight.requires_grad
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    tuner.train()
    assert all(norm.bias.any() for norm in norms)


def test_unaligned_weights_get_storage_of_their_own(make_gpt: Callable[..., nn.Module], make_config: Any) -> None:
    model = make_gpt()
    weight = model.blocks[0].mlp.up.weight
    values = weight.detach().clone()
    storage = torch.zeros(weight.numel() + 1)
    weight.data = storage[1:].view_as(weight).copy_(values)
    assert weight.data_ptr() % 64
    assert place(model, make_config()) == torch.device("cpu")
    assert all(each.data_ptr() % 64 == 0 for each in model.parameters())
    assert torch.equal(weight, values)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_there_is_refused_by_name(
    make_gpt: Callable[..., nn.Module], make_config: Any, device: str
) -> None:
    with pytest.raises(ConfigError, match=f"device='{device}' cannot be used here"):
        place(make_gpt(), make_config(device=device))


def test_checkpointing_is_refused_where_the_model_has_none() -> None:
    with pytest.raises(ConfigError, match="gradient_checkpointing: Linear does not support it"):
        enable_checkpointing(nn.Linear(2, 2))
