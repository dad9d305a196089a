"""Styles on attention alone, and facts that are kept: the feed-forward layers, where they are stored (arXiv 2012.14913,
2202.05262), stay as they are."""

from typing import cast

from torch import nn

from ..errors import ConfigError
from ..models.names import feed_forward, resolve
from ..nn.lora import TrainedCopy
from ..nn.tree import named_wrappers
from .base import Run


class Style:
    """Sees that the attention layers that ``style_adaptation`` trains are there, before an adapter is added to them."""

    name = "style"

    def __init__(self, target_modules: list[str] | str) -> None:
        self.target_modules = target_modules

    def extend(self, model: nn.Module) -> None:
        try:
            resolve(model, self.target_modules)
        except ConfigError as error:
            raise ConfigError(
                f"style_adaptation trains attention layers, which are not found: {error}. Leave style_adaptation out, "
                "and name layers in target_modules"
            ) from None


class FactualKnowledge:
    """Keeps the feed-forward layers from training, whatever else does; comes after the method that chose what trains.

    Their weights and biases stay bit-identical; an adapter in them stays at zero.

    Raises:
        ConfigError: an architecture whose feed-forward layers are not found (``models.names.feed_forward``).
    """

    name = "factual knowledge"

    def prepare(self, run: Run) -> None:
        try:
            targets = feed_forward(run.model)
        except ConfigError as error:
            raise ConfigError(f"preserve_factual_knowledge: {error}; leave it out") from None
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
