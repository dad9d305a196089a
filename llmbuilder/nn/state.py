"""Which adapters a model has, and which of them take part: one object that all adapted layers of a model share."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import LLMBuilderError, nearest
from .config import LoRAConfig


@dataclass
class TrainedBiases:
    """Biases that one adapter trains in place, and the values that they have while it is off."""

    owner: str
    parameters: list[nn.Parameter]
    others: list[Tensor]
    on: bool = True

    def switch(self, on: bool) -> None:
        """Exchange the trained values for the original ones, or back."""
        if on != self.on:
            for i, parameter in enumerate(self.parameters):
                parameter.data, self.others[i] = self.others[i].to(parameter), parameter.data
            torch.clear_autocast_cache()  # it knows a parameter by its object, and would go on with the other values
            self.on = on


@dataclass
class Merge:
    """What a merge that can be undone replaced: (module, its weight), and whether the model called its head tied."""

    kept: list[tuple[nn.Module, nn.Parameter]]
    tied: bool


@dataclass
class AdapterState:
    """The adapters of one model.

    ``configs``: what each was made of. ``active``: those that take part, with their weights. ``enabled``: False inside
    ``adapters_disabled``. ``merge``: set while the weights hold the active adapters.
    """

    configs: dict[str, LoRAConfig] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    enabled: bool = True
    merge: Merge | None = None
    biases: TrainedBiases | None = None

    @property
    def in_force(self) -> dict[str, float]:
        """The adapters to add to the bases' outputs, with their weights."""
        return self.active if self.enabled and self.merge is None else {}

    def switch_biases(self) -> None:
        """Put the biases in force that belong to what is active and enabled now."""
        if self.biases is not None:
            self.biases.switch(self.enabled and self.biases.owner in self.active)


def check_unmerged(state: AdapterState) -> None:
    """Raise LLMBuilderError while adapters are merged: what would be changed is then part of the weights."""
    if state.merge is not None:
        raise LLMBuilderError("the adapters are merged into the weights: call unmerge_lora(model) first")


def check_known(state: AdapterState, *names: str) -> None:
    """Raise LLMBuilderError for the first name that is no adapter of the model."""
    for name in names:
        if name not in state.configs:
            raise LLMBuilderError(
                f"no adapter is called '{name}'{nearest(name, state.configs) or '.'} "
                f"There are: {', '.join(state.configs)}"
            )
