"""Keep facts: the feed-forward layers, where they are stored (arXiv 2012.14913, 2202.05262), stay as they are."""

from typing import cast

from torch import nn

from ..models.names import resolve
from ..nn.lora import TrainedCopy
from ..nn.tree import named_wrappers
from .base import Run


class FactualKnowledge:
    """Keeps the feed-forward layers from training, whatever else does; comes after the method that chose what trains.

    Their weights and biases stay bit-identical; an adapter in them stays at zero.

    Raises:
        ConfigError: an architecture whose feed-forward layers are not known by name (``models.names``).
    """

    name = "factual knowledge"

    def prepare(self, run: Run) -> None:
        targets = resolve(run.model, "mlp")
        layers = {id(target.module) for target in targets}
        for module in run.model.modules():
            if id(_inner(module)) in layers:
                module.requires_grad_(False)
        for path, wrapper in named_wrappers(run.model):  # modules_to_save: of them an adapter has a copy
            for target in targets if isinstance(wrapper, TrainedCopy) else ():
                if f"{target.path}.".startswith(f"{path}."):
                    for copied in cast(nn.ModuleDict, wrapper.copies).values():
                        copied.get_submodule(target.path[len(path) + 1 :]).requires_grad_(False)


def _inner(module: nn.Module) -> nn.Module:
    """The layer itself, out of the wrappers of its adapters."""
    while getattr(type(module), "wraps_base", False):
        module = module.base  # type: ignore[assignment]
    return module
