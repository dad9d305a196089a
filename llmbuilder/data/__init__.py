"""Data: files and rows to tokenised examples, and examples to batches."""

from typing import Any

from .collate import Collator, collate
from .examples import Dataset, Example
from .load import load_dataset
from .report import DataReport
from .split import DatasetView, split
from .task import ChatDataset, TaskDataset
from .text import TextDataset
from .tokens import TokenDataset

__all__ = [
    "ChatDataset",
    "Collator",
    "DataReport",
    "Dataset",
    "DatasetView",
    "Example",
    "TaskDataset",
    "TextDataset",
    "TokenDataset",
    "collate",
    "load_dataset",
    "split",
]


def __getattr__(name: str) -> Any:
    if name == "MultiTaskDataset":
        raise AttributeError("MultiTaskDataset: training on several tasks at once is not there yet")
    raise AttributeError(f"module 'llmbuilder.data' has no attribute '{name}'")
