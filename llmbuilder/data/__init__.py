"""Data: files and rows to tokenised examples, and examples to batches."""

from .collate import Collator, collate
from .examples import Dataset, Example
from .load import load_dataset
from .multitask import MultiTaskDataset
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
    "MultiTaskDataset",
    "TaskDataset",
    "TextDataset",
    "TokenDataset",
    "collate",
    "load_dataset",
    "split",
]
