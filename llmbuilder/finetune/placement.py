"""Where a model's weights lie, and in which dtype."""

import torch
from torch import nn

from ..errors import ConfigError
from .config import FineTuningConfig

ALIGNMENT = 64


def place(model: nn.Module, config: FineTuningConfig) -> torch.device:
    """Move the model to the device that ``config`` names, each weight into storage of its own where it is not aligned:
    isolated products change their last bits with alignment, and a resumed run must repeat them.

    Raises:
        ConfigError: there is no such device here.
    """
    wanted = config.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device='{wanted}' cannot be used here: {str(error).splitlines()[0]}") from None
    for weight in model.parameters():
        if weight.data_ptr() % ALIGNMENT:
            weight.data = weight.data.clone()
    return device


def use_bf16(model: nn.Module, config: FineTuningConfig) -> bool:
    """Bring frozen weights to the dtype of the run and trained ones to fp32; returns whether to autocast to bf16.

    ``auto`` means bf16 where the model has any bf16 weight. A norm of which something trains is fp32 as a whole: torch
    takes its weight and its bias in one dtype only.
    """
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    bf16 = config.dtype == "bf16" or (config.dtype == "auto" and any(w.dtype == torch.bfloat16 for w in weights))
    whole = {id(weight) for module in model.modules() for weight in _trained_norm(module)}
    for weight in weights:
        frozen = not weight.requires_grad and id(weight) not in whole
        weight.data = weight.data.to(torch.bfloat16 if bf16 and frozen else torch.float32)
    return bf16


def _trained_norm(module: nn.Module) -> list[nn.Parameter]:
    """The weights of a norm, a module that holds vectors alone, of which one trains."""
    own = list(module.parameters(recurse=False))
    return own if all(weight.ndim == 1 for weight in own) and any(weight.requires_grad for weight in own) else []


def enable_checkpointing(model: nn.Module) -> None:
    """Keep few activations and compute the rest again in the backward pass.

    Non-reentrant, so that it works where only adapters inside a block need a gradient, and repeats random numbers.

    Raises:
        ConfigError: the model cannot do so.
    """
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise ConfigError(f"gradient_checkpointing: {type(model).__name__} does not support it")
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})
