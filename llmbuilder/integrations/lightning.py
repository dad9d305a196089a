"""Adapters under Lightning: a model with adapters trains there as it is; this saves them beside each checkpoint."""

from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from ..nn import list_adapters, save_adapter


class SaveAdapter(Callback):
    """Writes the adapters in PEFT's format whenever Lightning makes a checkpoint.

    ``Trainer(..., callbacks=[SaveAdapter(model, "runs/adapters")])`` leaves a folder ``step-N`` there for each
    checkpoint (one of each adapter's name in it where there are several). Lightning's own file holds the whole module.

    Args:
        model: what carries the adapters, usually an attribute of the LightningModule. Names in the files are those that
            layers have in it, so that the adapter fits the model itself.
        folder: where the adapters go.
    """

    def __init__(self, model: nn.Module, folder: str | Path) -> None:
        self.model = model
        self.folder = Path(folder)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not trainer.is_global_zero:
            return
        folder = self.folder / f"step-{trainer.global_step}"
        names = list(list_adapters(self.model))
        for name in names:
            save_adapter(self.model, folder if len(names) == 1 else folder / name, name)
