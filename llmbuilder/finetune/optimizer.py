"""torch's optimizers, with weight decay where it belongs and a state that is saved by parameter name."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import FineTuningConfig

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name; one that several modules share appears once."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def make_optimizer(config: FineTuningConfig, trained: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that ``config`` names, torch's own in its fused form (one pass over memory).

    Two groups: matrices and embeddings decay by ``weight_decay``; norms and biases (all that has one dimension) do not.
    """
    groups = [
        {"params": [w for w in trained.values() if w.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [w for w in trained.values() if w.dim() < 2], "weight_decay": 0.0},
    ]
    kind: Any = OPTIMIZERS[config.optimizer]
    return kind([group for group in groups if group["params"]], lr=config.learning_rate, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state as ``{"<what>/<parameter>": tensor}``."""
    return {
        f"{what}/{name}": value
        for name, weight in trained.items()
        for what, value in optimizer.state.get(weight, {}).items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Take back what ``optimizer_tensors`` returned, into storage of its own on each parameter's device."""
    for key, value in tensors.items():
        what, name = key.split("/", 1)
        weight = trained[name]
        optimizer.state[weight][what] = value.to(weight.device, copy=True)


@torch.no_grad()
def copy_weights(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy each tensor into the storage of the one of the same name."""
    for name, value in source.items():
        target[name].copy_(value)


def clip_gradients(weights: Sequence[nn.Parameter], most: float | None) -> float:
    """The norm of all gradients together, before they are scaled down to ``most``."""
    norm = nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    if most is not None:
        nn.utils.clip_grads_with_norm_(weights, most, norm)
    return float(norm)
