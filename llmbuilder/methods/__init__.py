"""Fine-tuning methods: hooks on the one loop of ``llmbuilder.finetune``."""

from .base import Batch, Example, Key, Method, Methods, Run
from .base_task import BaseTask
from .distill import GeneralKnowledge
from .domain import Domain
from .ewc import EWC
from .freeze import Freeze
from .full import Full
from .general import General
from .l2 import L2
from .lora import LoRA
from .progressive import Progressive
from .replay import Replay
from .style import FactualKnowledge
from .tokens import SpecialTokens

__all__ = [
    "EWC",
    "L2",
    "BaseTask",
    "Batch",
    "Domain",
    "Example",
    "FactualKnowledge",
    "Freeze",
    "Full",
    "General",
    "GeneralKnowledge",
    "Key",
    "LoRA",
    "Method",
    "Methods",
    "Progressive",
    "Replay",
    "Run",
    "SpecialTokens",
]
