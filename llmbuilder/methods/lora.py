"""LoRA: the model stays as it is, small adapters beside its layers train (arXiv 2106.09685)."""

from pathlib import Path

from torch import nn

from ..errors import ConfigError
from ..nn import LoRAConfig, activate_adapters, add_lora, list_adapters, save_adapter
from ..nn.lora import Update
from .base import Run


class LoRA:
    """Adds an adapter to the model and trains it, and nothing else; a run that goes on trains the one that is there.

    Args:
        config: rank, alpha, dropout, target modules and what else an adapter has.

    Raises:
        ConfigError: in a run that goes on, another rank or alpha than the adapter's.
    """

    name = "lora"

    def __init__(self, config: LoRAConfig) -> None:
        self.config = config

    def prepare(self, run: Run) -> None:
        if run.continues:
            self._go_on(run.model)
        else:
            add_lora(run.model, self.config)

    def _go_on(self, model: nn.Module) -> None:
        (name, had), *_ = list_adapters(model).items()
        if (had.rank, had.scaling) != (self.config.rank, self.config.scaling):
            raise ConfigError(
                f"the earlier run's adapter has rank {had.rank} and alpha {had.alpha:g}, this run asks for "
                f"{self.config.rank} and {self.config.alpha:g}: give those it has"
            )
        model.requires_grad_(False)
        activate_adapters(model, name)
        for module in model.modules():
            if isinstance(module, Update):
                module.p = self.config.dropout

    def export(self, model: nn.Module, folder: Path) -> None:
        save_adapter(model, folder / "adapter")
