"""Keep facts: the feed-forward layers, where they are stored (arXiv 2012.14913, 2202.05262), stay as they are."""

from torch import nn

from ..models.names import resolve
from .base import Run


class FactualKnowledge:
    """Keeps the feed-forward layers from training, whatever else does; comes after the method that chose what trains.

    Their weights and biases stay bit-identical; an adapter in them stays at zero.

    Raises:
        ConfigError: an architecture whose feed-forward layers are not known by name (``models.names``).
    """

    name = "factual knowledge"

    def prepare(self, run: Run) -> None:
        layers = {id(target.module) for target in resolve(run.model, "mlp")}
        for module in run.model.modules():
            if id(_inner(module)) in layers:
                module.requires_grad_(False)


def _inner(module: nn.Module) -> nn.Module:
    """The layer itself, out of the wrappers of its adapters."""
    while getattr(type(module), "wraps_base", False):
        module = module.base  # type: ignore[assignment]
    return module
