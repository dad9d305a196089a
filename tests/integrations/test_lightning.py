"""A model with our adapters under Lightning: the losses of a plain loop, adapters at checkpoints."""

from pathlib import Path

import peft
import pytest
import pytorch_lightning as lightning
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader

from llmbuilder.integrations.lightning import SaveAdapter
from llmbuilder.nn import LoRAConfig, add_lora, load_adapter

ROWS = torch.randint(61, (40, 12), generator=torch.Generator().manual_seed(7))


def base() -> nn.Module:
    shape = {"vocab_size": 61, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, intermediate_size=48, num_key_value_heads=2))


class Module(lightning.LightningModule):
    """The wrapper that a user of Lightning writes."""

    def __init__(self) -> None:
        super().__init__()
        self.model = base()
        add_lora(self.model, LoRAConfig(rank=3, target_modules=["q_proj", "v_proj"]))
        self.losses: list[float] = []

    def training_step(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        loss = self.model(input_ids=rows, labels=rows).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def fit(module: Module, folder: Path, steps: int) -> None:
    torch.manual_seed(3)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        callbacks=[SaveAdapter(module.model, folder / "adapters")],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(ROWS, batch_size=8))


def test_lightning_reaches_the_losses_of_a_plain_loop(tmp_path: Path) -> None:
    module, plain = Module(), Module()
    fit(module, tmp_path, 10)
    torch.manual_seed(3)
    optimizer = plain.configure_optimizers()
    plain.train()
    for step in range(10):
        rows = ROWS[8 * (step % 5) : 8 * (step % 5) + 8]
        optimizer.zero_grad()
        plain.training_step(rows, step).backward()
        optimizer.step()
    assert len(module.losses) == 10 and module.losses[0] > module.losses[-1]
    assert module.losses == pytest.approx(plain.losses, rel=1e-5)
    frozen = base().state_dict()
    bases = {name: weight for name, weight in module.model.state_dict().items() if "lora" not in name}
    assert all(torch.equal(weight, frozen[name.replace("base.", "")]) for name, weight in bases.items())


def test_a_checkpoint_leaves_an_adapter_that_fits_the_model_itself(tmp_path: Path) -> None:
    module = Module()
    fit(module, tmp_path, 5)
    with torch.no_grad():
        expected = module.model.eval()(ROWS[:2]).logits
        again = base().eval()
        assert not torch.equal(again(ROWS[:2]).logits, expected)
        load_adapter(again, tmp_path / "adapters" / "step-5")
        assert torch.equal(again.eval()(ROWS[:2]).logits, expected)
        theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "adapters" / "step-5").eval()
        torch.testing.assert_close(theirs(ROWS[:2]).logits, expected, rtol=1e-5, atol=1e-5)
