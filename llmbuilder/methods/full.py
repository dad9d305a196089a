"""Full fine-tuning: every parameter trains."""

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from ..models import save_model
from ..nn.tasks import heads_aside
from .base import Run


class Full:
    """Trains every parameter of the model.

    Args:
        dropout_rate: p of every dropout that the model has; None leaves each as it is.
    """

    name = "full"

    def __init__(self, dropout_rate: float | None = None) -> None:
        self.dropout_rate = dropout_rate

    def prepare(self, run: Run) -> None:
        run.model.requires_grad_(True)
        if self.dropout_rate is not None:
            set_dropout(run.model, self.dropout_rate)

    def export(self, model: nn.Module, folder: Path) -> None:
        with heads_aside(model):
            save_model(model, folder / "model")


def set_dropout(model: nn.Module, p: float) -> None:
    """Set the probability of every dropout in ``model``: of each ``nn.Dropout``, and of what the attention and residual
    code reads from a module's or the config's number (``attention_dropout``, ``resid_pdrop`` …).

    Warns where the model has no dropout layer, and says what, if anything, the rate acts on there.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    for layer in layers:
        layer.p = p
    numbers = [(owner, name) for owner in (*model.modules(), model.config) for name in _dropout_numbers(owner)]
    for owner, name in numbers:
        setattr(owner, name, p)
    if not layers:
        acts = "acts on its attention weights only" if numbers else "has no effect"
        warnings.warn(f"{type(model).__name__} has no dropout layer: dropout_rate={p} {acts}", stacklevel=2)


def _dropout_numbers(owner: Any) -> list[str]:
    """Names of the plain numbers of a module or config that are a dropout probability in the language model."""
    return [
        name
        for name, value in vars(owner).items()
        if name.endswith(("dropout", "pdrop", "dropout_prob", "dropout_p"))
        and not name.startswith(("classifier", "summary"))
        and isinstance(value, float)
    ]
