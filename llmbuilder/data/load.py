"""One door to the datasets: chosen by the settings and by the shape of the data."""

from pathlib import Path
from typing import Any, cast

import yaml

from ..errors import LLMBuilderError
from .examples import Dataset
from .formats import Data, read_rows
from .multitask import MultiTaskDataset
from .shapes import main_shape
from .task import ChatDataset, TaskDataset
from .text import TextDataset, asks_for_responses
from .tokens import TokenDataset


def load_dataset(path: Data | Dataset, config: Any) -> Dataset:
    """The dataset for these data and settings.

    The first line that fits:

    | data | settings | dataset |
    |---|---|---|
    | a dataset already (anything with ``bind``) | any | itself |
    | a YAML file that lists ``{name, data, share}`` | any | ``MultiTaskDataset``; ``data``, by this table |
    | rows with ``input_ids`` | any | ``TokenDataset`` |
    | any | ``dialogue_format`` or ``task_type="conversation"`` | ``ChatDataset`` |
    | any | ``task_type="language_modeling"`` | ``TextDataset`` with blocks of ``max_seq_length`` |
    | plain text | ``task_type="code"`` or none | the same |
    | any | another ``task_type`` | ``TaskDataset`` |
    | messages | no ``task_type`` | ``ChatDataset`` |
    | pairs | no ``task_type`` | ``TaskDataset`` of the task that the names of their columns tell |

    Args:
        path: a file or folder, rows in memory, a torch map-style dataset of tokenised examples, or a dataset.
        config: read by name: ``task_type``, ``dialogue_format``, ``max_seq_length``.

    Returns:
        The dataset, not bound yet. Its report says what was chosen, and why.

    Raises:
        LLMBuilderError: what ``read_rows`` and the datasets raise.
    """
    if hasattr(path, "bind"):
        return cast(Dataset, path)
    if isinstance(path, str | Path) and Path(path).suffix in (".yaml", ".yml"):
        return _tasks(Path(path), config)
    reading = read_rows(path)
    shape = main_shape(reading.rows)
    if shape == "tokens":
        return TokenDataset(reading)
    task, why = _task_type(shape, config)
    reading.report.notes.append(f"Taken as {task}, {why}")
    if task == "conversation":
        return ChatDataset(reading)
    if asks_for_responses(task, reading.rows):
        return TaskDataset(reading, task)
    return TextDataset(reading, block_size=getattr(config, "max_seq_length", None) or 1024)


def _tasks(path: Path, config: Any) -> MultiTaskDataset:
    """Several tasks, as a YAML file lists them."""
    try:
        listed = yaml.safe_load(path.read_text(encoding="utf-8"))
        tasks = [(str(task["name"]), path.parent / task["data"], float(task["share"])) for task in listed]
    except OSError as error:
        raise LLMBuilderError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise LLMBuilderError(f"{path}: should be a list of {{name: …, data: …, share: …}} ({reason})") from None
    return MultiTaskDataset([(name, load_dataset(data, config), share) for name, data, share in tasks])


def _task_type(shape: str, config: Any) -> tuple[str, str]:
    if getattr(config, "dialogue_format", False):
        return "conversation", "as dialogue_format says"
    if task_type := getattr(config, "task_type", None):
        return task_type, "as task_type says"
    by_shape = {"messages": "conversation", "text": "language_modeling", "unknown": "language_modeling"}
    return by_shape.get(shape, shape), f"by the shape of the rows ({shape})"
