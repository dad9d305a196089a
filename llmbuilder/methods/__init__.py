"""Fine-tuning methods: hooks on the one loop of ``llmbuilder.finetune``."""

from .base import Batch, Example, Key, Method, Methods, Run
from .freeze import Freeze
from .full import Full
from .general import General
from .lora import LoRA

__all__ = ["Batch", "Example", "Freeze", "Full", "General", "Key", "LoRA", "Method", "Methods", "Run"]
