"""Bytes that eager torch moves, operator by operator.

Every operator that computes reads each of its tensors once and writes its results once; views move nothing. That is
what a GPU's eager kernels do at least, so it favours eager code: library products read their operands more than once.
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class EagerTraffic(TorchDispatchMode):
    """Within it, ``moved`` counts bytes by the shape of the tensor that was read or written."""

    def __init__(self):
        super().__init__()
        self.moved: Counter[tuple[int, ...]] = Counter()
        self.operators: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not (_is_view(function) or _allocates(function)):
            self.operators.append(function.name().removeprefix("aten::"))
            read = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.numel()}
            for tensor in (*read.values(), *(t for t in tree_leaves(result) if isinstance(t, torch.Tensor))):
                self.moved[_name(tensor)] += tensor.numel() * tensor.element_size()
        return result


def _name(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(sorted(tensor.shape))  # a transposed view is the same matrix


def _is_view(function) -> bool:
    returns = function._schema.returns
    aliases = [r.alias_info for r in returns if r.alias_info is not None]
    return function.name() == "aten::detach" or (bool(aliases) and not any(a.is_write for a in aliases))


def _allocates(function) -> bool:
    name = function.name().removeprefix("aten::").partition(".")[0]
    return name in ("new_empty", "empty_like") or not any(
        isinstance(argument.type, torch.TensorType) for argument in function._schema.arguments
    )
