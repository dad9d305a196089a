"""What each task has of its own on one model: an output head (hard sharing, arXiv 1901.11504), an adapter."""

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import LLMBuilderError, nearest, no_such_task
from ..models.names import named_layers
from ..models.save import replacing
from .peft_format import load_adapter
from .tree import places

WEIGHTS = "heads.safetensors"


class TaskHeads(nn.Module):
    """An output layer, and one of the same shape for each task; ``active`` names the one that serves, None the first.

    Args:
        base: the model's own output layer.
        tasks: the heads start as copies of it, with weights of their own.

    Attributes that this wrapper lacks are those of the layer that serves.
    """

    wraps_base: ClassVar[bool] = True

    def __init__(self, base: nn.Module, tasks: Sequence[str]) -> None:
        super().__init__()
        own = next(named_layers(base))[1]
        self.base = base
        self.heads = nn.ModuleList(copy.deepcopy(own).requires_grad_(True) for _ in tasks)
        self.tasks = [*tasks]  # any name will do, which a ModuleDict's keys would not
        self.active: str | None = None

    def serving(self) -> nn.Module:
        """The active task's head, or the model's own."""
        return self.base if self.active is None else self.heads[self.tasks.index(self.active)]

    def forward(self, hidden: Any) -> Any:
        return self.serving()(hidden)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base", "heads") or "active" not in self.__dict__:  # half made, as inside deepcopy
                raise
            return getattr(self.serving(), name)


def add_heads(model: nn.Module, tasks: Sequence[str]) -> TaskHeads:
    """Give the model an output head for each task, in place, and return them; they train. None of them is active yet.

    Raises LLMBuilderError for a model without an output layer.
    """
    owner: Any = model
    layer = owner.get_output_embeddings()
    if layer is None:
        raise LLMBuilderError(f"{type(model).__name__} has no output layer of its own to make heads of")
    heads = TaskHeads(layer, tasks)
    for parent, child in places(model, [layer])[id(layer)]:
        parent._modules[child] = heads
    return heads


def find_heads(model: nn.Module) -> TaskHeads | None:
    """The model's heads; None where it has none."""
    return next((module for module in model.modules() if isinstance(module, TaskHeads)), None)


def use_head(model: nn.Module, task: str | None) -> None:
    """Let the head of a task serve, or with None the model's own. Raises LLMBuilderError for an unknown task."""
    heads = find_heads(model)
    known = heads.tasks if heads else []
    if task is not None and task not in known:
        raise LLMBuilderError(f"no head is for the task '{task}'{nearest(task, known) or '.'} There are: {known}")
    if heads is not None:
        heads.active = task


@contextmanager
def heads_aside(model: nn.Module) -> Iterator[None]:
    """While open, the model is what it was before it had heads, modules and all."""
    heads = find_heads(model)
    where = places(model, [heads])[id(heads)] if heads is not None else []
    for parent, child in where:
        parent._modules[child] = heads.base if heads is not None else None
    try:
        yield
    finally:
        for parent, child in where:
            parent._modules[child] = heads


def save_heads(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the heads of all tasks into a folder, whole or not at all. Raises LLMBuilderError where there are none."""
    heads = find_heads(model)
    if heads is None:
        raise LLMBuilderError("the model has no heads of tasks")
    tensors = {
        f"{task}/{name}": tensor.detach().cpu().contiguous().clone()
        for task, head in zip(heads.tasks, heads.heads, strict=True)
        for name, tensor in head.state_dict().items()
    }
    with replacing(Path(folder)) as temporary:
        temporary.mkdir()
        save_file(tensors, temporary / WEIGHTS)


def load_heads(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Add the heads that a folder holds to the model that they were made for; ``use_head`` chooses one.

    Raises LLMBuilderError where the folder holds none, or they do not fit.
    """
    tasks = _tasks_of_heads(Path(folder))
    tensors = load_file(Path(folder) / WEIGHTS)
    heads = find_heads(model)
    if heads is None or sorted(heads.tasks) != tasks:
        heads = add_heads(model, tasks)
    for task, head in zip(heads.tasks, heads.heads, strict=True):
        values = {key.rpartition("/")[2]: tensor for key, tensor in tensors.items() if key.rpartition("/")[0] == task}
        try:
            head.load_state_dict(values)
        except RuntimeError as error:
            raise LLMBuilderError(f"the heads in {folder} were made for another model: {error}") from None


def list_tasks(folder: str | os.PathLike[str]) -> list[str]:
    """The tasks that have something of their own in a run's folder: adapters/TASK or a head in heads/."""
    adapters, heads = Path(folder).glob("adapters/*/adapter_config.json"), Path(folder) / "heads"
    return sorted(path.parent.name for path in adapters) or (_tasks_of_heads(heads) if heads.is_dir() else [])


def load_task(model: nn.Module, folder: str | os.PathLike[str], task: str) -> None:
    """Give a model what a run's folder holds for one task alone: its adapter, its head, or both; they serve.

    Args:
        model: the model that the run trained; where the tasks share an adapter, with that adapter.
        folder: the run's.
        task: one of ``list_tasks(folder)``.

    Raises LLMBuilderError for any other task, or as ``load_adapter`` and ``load_heads`` do.
    """
    known = list_tasks(folder)
    if not known:
        raise LLMBuilderError(f"{folder} holds nothing of a task '{task}': no adapters/ and no heads/")
    if task not in known:
        raise LLMBuilderError(no_such_task(str(folder), task, known))
    if (Path(folder) / "adapters").is_dir():
        load_adapter(model, Path(folder) / "adapters" / task, task)
    if (Path(folder) / "heads").is_dir():
        load_heads(model, Path(folder) / "heads")
        use_head(model, task)


def _tasks_of_heads(folder: Path) -> list[str]:
    """The tasks whose heads a folder holds. Raises LLMBuilderError where it can't be read."""
    path = folder / WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            return sorted({key.rpartition("/")[0] for key in file.keys()})  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError) as error:
        raise LLMBuilderError(f"{path} can't be read: {error}") from None
