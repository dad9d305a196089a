"""LoRA as a method: an adapter is added, trains alone, and is what is written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmbuilder.errors import ConfigError
from llmbuilder.methods import LoRA, Run
from llmbuilder.models import GPT, GPTConfig
from llmbuilder.nn import LoRAConfig, add_lora, load_adapter
from llmbuilder.nn.lora import Update

IDS = torch.arange(12).reshape(2, 6)


def gpt() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT(GPTConfig(vocab_size=31, n_layer=2, n_head=2, n_embd=16, block_size=16)).eval()


def test_only_the_adapter_trains_and_the_model_starts_as_it_was() -> None:
    model = gpt()
    own = {id(weight) for weight in model.parameters()}
    LoRA(LoRAConfig(rank=2, target_modules=["attention.query"])).prepare(Run(model))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert len(trained) == 4 and not {id(weight) for weight in trained} & own
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, gpt()(input_ids=IDS).logits)


def test_what_was_trained_is_written_and_loads_again(tmp_path: Path) -> None:
    model, fresh = gpt(), gpt()
    method = LoRA(LoRAConfig(rank=2, target_modules="attention"))
    method.prepare(Run(model))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_()
    method.export(model, tmp_path)
    load_adapter(fresh, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(fresh.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
        assert not torch.allclose(gpt()(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize(
    "unlike",
    [
        {"rank": 4},
        {"alpha": 5.0},
        {"target_modules": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["norm"]},
        {"trainable_token_indices": [3]},
    ],
    ids=str,
)
def test_an_adapter_that_is_there_must_be_what_is_asked_for(unlike: dict[str, Any]) -> None:
    """In all but its dropout, which is set."""
    had = {"rank": 2, "target_modules": ["attention.query"]}
    model = gpt()
    LoRA(LoRAConfig(**had)).prepare(Run(model))
    with pytest.raises(ConfigError, match="the earlier run's adapter has"):
        LoRA(LoRAConfig(**had | unlike)).prepare(Run(model, continues=True))
    LoRA(LoRAConfig(**had, dropout=0.25)).prepare(Run(model, continues=True))
    assert {module.p for module in model.modules() if isinstance(module, Update)} == {0.25}
    assert any(weight.requires_grad for weight in model.parameters())


def test_one_adapter_is_gone_on_with_and_not_one_of_several() -> None:
    model = gpt()
    config = LoRAConfig(rank=2)
    for name in ("qa", "text"):
        add_lora(model, config, name)
    with pytest.raises(ConfigError, match="qa, text, and this run trains one"):
        LoRA(config).prepare(Run(model, continues=True))
