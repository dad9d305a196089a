"""LoRA: the model stays as it is, small adapters beside its layers train (arXiv 2106.09685)."""

from pathlib import Path
from typing import cast

from torch import nn

from ..errors import ConfigError
from ..models.names import resolve
from ..nn import LoRAConfig, LoRAEmbedding, LoRALinear, activate_adapters, add_lora, list_adapters, save_adapter
from ..nn.inject import modules_to_save
from ..nn.lora import TrainedCopy, Update
from ..nn.tree import state_of, wrappers
from .base import Run


class LoRA:
    """Adds an adapter to the model and trains it, and nothing else; a run that goes on trains the one that is there.

    Args:
        config: rank, alpha, dropout, target modules and what else an adapter has.

    Raises:
        ConfigError: in a run that goes on, several adapters, or one that is not what ``config`` asks for.
    """

    name = "lora"

    def __init__(self, config: LoRAConfig) -> None:
        self.config = config

    def prepare(self, run: Run) -> None:
        if run.continues:
            self._go_on(run.model)
        elif "default" in list_adapters(run.model):
            raise ConfigError(
                "the model has an adapter 'default' already: load the model anew, or go on with that adapter by "
                "continue_from"
            )
        else:
            add_lora(run.model, self.config)

    def _go_on(self, model: nn.Module) -> None:
        names = list(list_adapters(model))
        if not names:
            raise ConfigError("the earlier run trained no adapter: give use_lora=False, as that run did")
        if len(names) != 1:
            raise ConfigError(
                f"the model has the adapters {', '.join(names)}, and this run trains one: give shared_encoder=False "
                "as the run that made them, or load a model with one of them"
            )
        go_on_with(model, names[0], self.config)
        model.requires_grad_(False)
        activate_adapters(model, names[0])

    def export(self, model: nn.Module, folder: Path) -> None:
        save_adapter(model, folder / "adapter")


def go_on_with(model: nn.Module, name: str, config: LoRAConfig) -> None:
    """Have an adapter that is there trained as ``config`` says: with its dropout.

    Raises ConfigError where the adapter is not what ``config`` asks for in anything else.
    """
    had = list_adapters(model)[name]
    if (had.rank, had.scaling) != (config.rank, config.scaling):
        raise ConfigError(
            f"the earlier run's adapter has rank {had.rank} and alpha {had.alpha:g}, this run asks for "
            f"{config.rank} and {config.alpha:g}: give those it has"
        )
    low_rank = {id(w.base) for w in wrappers(model) if isinstance(w, LoRALinear | LoRAEmbedding) and name in w.adapters}
    whole = {id(w.base) for w in wrappers(model) if isinstance(w, TrainedCopy) and name in w.copies}
    copied = modules_to_save(model, config.modules_to_save)
    targets = resolve(model, config.target_modules, exclude=list(copied))
    unlike = {
        "target_modules": low_rank != {id(target.module) for target in targets},
        "modules_to_save": whole != {id(module) for module in copied.values()},
        "bias": had.bias != config.bias,
        "trainable_token_indices": not {*config.trainable_token_indices} <= {*had.trainable_token_indices},
    }
    for field in (field for field, differs in unlike.items() if differs):
        raise ConfigError(
            f"the earlier run's adapter has {field}={getattr(had, field)!r}, this run asks for "
            f"{getattr(config, field)!r}: give those it has"
        )
    for wrapper in wrappers(model):
        if isinstance(wrapper, LoRALinear) and name in wrapper.adapters:
            cast(Update, wrapper.adapters[name]).p = config.dropout
    state_of(model).configs[name] = had.model_copy(update={"dropout": config.dropout})
