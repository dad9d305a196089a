"""What any decoder is made of: its blocks, its embeddings, its head, and the weights that are one and the same."""

from typing import Any

from torch import nn


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The transformer blocks with their names, bottom to top.

    They are the longest ``nn.ModuleList`` that lies in no other list (a list inside a block, such as the experts of a
    mixture, may be longer than the stack of blocks) and in no wrapper of a layer (the heads of tasks).

    Returns:
        ``[(name, module), ...]``, empty when the model has no list of modules.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    wrappers = [name for name, module in model.named_modules() if getattr(type(module), "wraps_base", False)]
    for wrapper in wrappers:
        own = f"{wrapper}.base."
        lists = {n: found for n, found in lists.items() if n.startswith(own) or not n.startswith(f"{wrapper}.")}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists if other != name)]
    if not outer:
        return []
    stack = max(outer, key=lambda name: len(lists[name]))
    return [(f"{stack}.{i}", block) for i, block in enumerate(lists[stack])]


def embeddings(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The embedding tables with their names: of tokens, and of positions where the model has one."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Embedding)]


def head(model: nn.Module) -> nn.Module:
    """The layer that turns hidden states into logits."""
    owner: Any = model  # nn.Module says nothing about what transformers adds to it
    layer: nn.Module = owner.get_output_embeddings()
    return layer


def tie_groups(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one weight under several names, such as a tied embedding and head.

    Returns:
        One list of names for each shared weight, in the order of ``named_parameters``.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def context_length(model: nn.Module) -> int | None:
    """The longest sequence that the model is made for, in tokens; None when its config names none."""
    config: Any = model.config
    if hasattr(config, "block_size"):
        return int(config.block_size)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(text, "max_position_embeddings", None)
    return int(length) if length else None
