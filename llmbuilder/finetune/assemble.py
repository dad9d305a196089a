"""From settings to methods."""

from typing import Any

from ..methods import Freeze, Full, LoRA
from .config import FineTuningConfig


def make_methods(config: FineTuningConfig) -> list[Any]:
    """The methods that the settings ask for, in the order of their hooks."""
    lora = config.lora()
    methods: list[Any] = [Full(config.dropout_rate) if lora is None else LoRA(lora)]
    if config.freeze_layers or config.freeze_embeddings:
        methods.append(Freeze(config.freeze_layers, config.freeze_embeddings))
    return methods
