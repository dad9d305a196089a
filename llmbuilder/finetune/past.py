"""What a run knows of those before it: the earlier tasks, and what the methods keep of them (``continue_from``).

past/   methods.safetensors   tensors by "<method>/<name>": Fisher information, anchors …
        state.json            the methods' other values, and the tasks so far
        manifest.json         {file name: sha256}
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ConfigError, LLMBuilderError
from ..models import load_model
from ..models.vocabulary import grow_vocabulary
from ..nn import list_adapters, load_adapter, load_heads
from .checkpoint import Checkpoint, find_fault, join_states, load_checkpoint, split_states, write_checkpoint


@dataclass
class Past:
    """The tasks that a model has learnt, in order, each with its name and a hash of its training data; and the methods'
    ``past()``, by method; and a hash of the base that adapters were trained on, where they were."""

    tasks: list[dict[str, str]] = field(default_factory=list)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    base: str = ""

    def save(self, path: Path) -> None:
        """Write it as a folder, whole or not at all. Raises LLMBuilderError where the disk refuses."""
        tensors, values = split_states(self.methods)
        kept = {"tasks": self.tasks, "methods": values, "base": self.base}
        write_checkpoint(path, Checkpoint({"methods": tensors}, kept))

    @classmethod
    def load(cls, path: Path) -> "Past":
        """Raises LLMBuilderError where a file is missing or damaged."""
        fault = find_fault(path) if path.is_dir() else "there is no such folder"
        if fault is not None:
            raise LLMBuilderError(f"{path} does not hold a finished run's past: {fault}; finish that run by resume")
        checkpoint = load_checkpoint(path)
        values = checkpoint.values
        return cls(values["tasks"], join_states(checkpoint.tensors["methods"], values["methods"]), values["base"])


def go_on(model: nn.Module, folder: Path, use_lora: bool, base: str = "") -> Past:
    """Bring ``model`` to where a finished run left it: its weights, or its adapter on the model that it was made for,
    whose hash is ``base`` (empty: not looked at).

    An adapter that the model has already stays as it is.

    Raises:
        ConfigError: the run trained weights and this one adapters, or the other way round; or it had another model.
        LLMBuilderError: the folder holds no finished run.
    """
    if not (folder / "results.json").exists():
        raise LLMBuilderError(f"continue_from {folder}: no run has come to its end there; finish it by resume")
    past = Past.load(folder / "past")
    adapters = [path for path in [folder / "adapter", *sorted((folder / "adapters").glob("*"))] if path.is_dir()]
    kind = "adapter" if use_lora else "model"
    if not (adapters if use_lora else (folder / kind).is_dir()):
        raise ConfigError(f"continue_from {folder}: it holds no {kind}/: give use_lora={not use_lora} as that run did")
    if use_lora:
        if base and past.base and base != past.base:
            raise ConfigError(f"continue_from {folder}: its adapter was trained on another model; load that one")
        for path in adapters if not list_adapters(model) else []:
            load_adapter(model, path, "default" if path.name == "adapter" else path.name)
        _load_heads(model, folder)
        return past
    try:
        trained: Any = load_model(folder / kind)
        grow_vocabulary(model, len(trained.get_input_embeddings().weight))
        state = trained.state_dict()
        for name, weight in model.named_parameters():  # a base in bf16 would round what was trained in fp32
            weight.data = weight.data.to(state[name].dtype) if name in state else weight.data
        model.load_state_dict(state)
        if getattr(trained, "tokenizer", None) is not None:  # with the tokens that the run added
            model.tokenizer = trained.tokenizer
    except RuntimeError:
        raise ConfigError(f"continue_from {folder}: made with another model; load it from {folder / kind}") from None
    _load_heads(model, folder)
    return past


def _load_heads(model: nn.Module, folder: Path) -> None:
    if (folder / "heads").is_dir():
        load_heads(model, folder / "heads")
