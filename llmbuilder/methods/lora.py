"""LoRA: the model stays as it is, small adapters beside its layers train (arXiv 2106.09685)."""

from pathlib import Path

from torch import nn

from ..nn import LoRAConfig, add_lora, save_adapter
from .base import Run


class LoRA:
    """Adds an adapter to the model and trains it, and nothing else.

    Args:
        config: rank, alpha, dropout, target modules and what else an adapter has.
    """

    name = "lora"

    def __init__(self, config: LoRAConfig) -> None:
        self.config = config

    def prepare(self, run: Run) -> None:
        add_lora(run.model, self.config)

    def export(self, model: nn.Module, folder: Path) -> None:
        save_adapter(model, folder / "adapter")
