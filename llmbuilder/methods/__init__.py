"""Fine-tuning methods: hooks on the one loop of ``llmbuilder.finetune``."""

from .base import Batch, Example, Key, Method, Methods, Run
from .base_task import BaseTask
from .code_loss import CodeLoss
from .distill import GeneralKnowledge
from .domain import Domain
from .ewc import EWC
from .fim import FillInTheMiddle
from .freeze import Freeze
from .full import Full
from .general import General
from .l2 import L2
from .lora import LoRA
from .multitask import MultiTask, TaskAdapters
from .progressive import Progressive
from .replay import Replay
from .style import FactualKnowledge, Style
from .tokens import SpecialTokens

__all__ = [
    "EWC",
    "L2",
    "BaseTask",
    "Batch",
    "CodeLoss",
    "Domain",
    "Example",
    "FactualKnowledge",
    "FillInTheMiddle",
    "Freeze",
    "Full",
    "General",
    "GeneralKnowledge",
    "Key",
    "LoRA",
    "Method",
    "Methods",
    "MultiTask",
    "Progressive",
    "Replay",
    "Run",
    "SpecialTokens",
    "Style",
    "TaskAdapters",
]
