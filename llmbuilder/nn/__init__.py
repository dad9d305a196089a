"""Layers with adapters, and the head that turns hidden states into a loss."""

from .adapters import (
    activate_adapters,
    active_adapters,
    adapters_disabled,
    combine_adapters,
    deactivate_adapter,
    delete_adapter,
    list_adapters,
)
from .config import LoRAConfig
from .heads import LanguageHead
from .inject import add_lora
from .lora import LoRAEmbedding, LoRALinear
from .merge import merge_lora, unmerge_lora
from .peft_format import load_adapter, save_adapter
from .tasks import list_tasks, load_heads, load_task, save_heads, use_head

__all__ = [
    "LanguageHead",
    "LoRAConfig",
    "LoRAEmbedding",
    "LoRALinear",
    "activate_adapters",
    "active_adapters",
    "adapters_disabled",
    "add_lora",
    "combine_adapters",
    "deactivate_adapter",
    "delete_adapter",
    "list_adapters",
    "list_tasks",
    "load_adapter",
    "load_heads",
    "load_task",
    "merge_lora",
    "save_adapter",
    "save_heads",
    "unmerge_lora",
    "use_head",
]
