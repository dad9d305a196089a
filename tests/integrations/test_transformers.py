"""A model with our adapters under transformers' Trainer: PEFT's losses, adapters at checkpoints, resuming."""

from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import Dataset

from llmbuilder.integrations.transformers import SaveAdapter
from llmbuilder.nn import LoRAConfig, add_lora, load_adapter

TARGETS = ["q_proj", "v_proj", "down_proj"]


class Texts(Dataset):
    """Forty rows of token ids; the same at each run."""

    def __init__(self) -> None:
        self.rows = torch.randint(61, (40, 12), generator=torch.Generator().manual_seed(7))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def llama() -> nn.Module:
    shape = {"vocab_size": 61, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": None}
    config = transformers.LlamaConfig(
        **shape, hidden_size=32, intermediate_size=48, num_key_value_heads=2, bos_token_id=None, eos_token_id=None
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def ours() -> nn.Module:
    model = llama()
    add_lora(model, LoRAConfig(rank=3, alpha=4, target_modules=TARGETS))
    return start(model)


def theirs() -> nn.Module:
    return start(peft.get_peft_model(llama(), peft.LoraConfig(r=3, lora_alpha=4, target_modules=TARGETS)))


def start(model: nn.Module) -> nn.Module:
    """The same A and B for both, in the order of the layers."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def train(model: nn.Module, folder: Path, resume: bool = False, **more: object) -> list[float]:
    """The loss of each of twenty steps."""
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 20,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_steps": 10,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 5,
            **more,
        }
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=Texts(), callbacks=[SaveAdapter()])
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_trainer_reaches_pefts_losses(optimizer: str, tmp_path: Path) -> None:
    mine = train(ours(), tmp_path / "ours", optim=optimizer)
    its = train(theirs(), tmp_path / "theirs", optim=optimizer)
    assert len(mine) == 20
    assert mine == pytest.approx(its, rel=1e-5)
    assert len(set(its)) > 1


def test_every_checkpoint_holds_the_adapter(tmp_path: Path) -> None:
    model = ours()
    train(model, tmp_path)
    again = llama()
    load_adapter(again, tmp_path / "checkpoint-20" / "adapter")
    in_peft = peft.PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-20" / "adapter")
    ids = Texts().rows[:2]
    with torch.no_grad():
        expected = model.eval()(ids).logits
        assert torch.equal(again.eval()(ids).logits, expected)
        torch.testing.assert_close(in_peft.eval()(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "checkpoint-10" / "adapter" / "adapter_config.json").exists()


def test_several_adapters_get_a_folder_each(tmp_path: Path) -> None:
    model = ours()
    add_lora(model, LoRAConfig(rank=2, target_modules=TARGETS), name="second")
    train(model, tmp_path, max_steps=1, save_steps=1)
    folder = tmp_path / "checkpoint-1" / "adapter"
    assert sorted(path.name for path in folder.iterdir()) == ["default", "second"]


def test_trainer_resumes_a_model_with_adapters(tmp_path: Path) -> None:
    """Ten steps, then ten more in a new process's model, end where twenty at once end."""
    whole = ours()
    expected = train(whole, tmp_path / "whole")
    train(ours(), tmp_path / "parts", max_steps=10)
    resumed = ours()
    losses = train(resumed, tmp_path / "parts", resume=True)
    assert losses == pytest.approx(expected, rel=1e-5)
    for (name, mine), its in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(mine, its, msg=name)
