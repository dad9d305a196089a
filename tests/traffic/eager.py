"""Bytes that eager torch moves, operator by operator.

Every operator that computes reads each of its tensors once and writes its results once; views move nothing. That is
what a GPU's eager kernels do at least, so it favours eager code: library products read their operands more than once.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

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
        read = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.numel()}
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        if not (_is_view(function, read.values(), made) or _allocates(function)):
            self.operators.append(function.name().removeprefix("aten::"))
            for tensor in (*read.values(), *made):
                self.moved[_name(tensor)] += tensor.numel() * tensor.element_size()
        return result


def _name(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(sorted(tensor.shape))  # a transposed view is the same matrix


def _is_view(function, read: Iterable[torch.Tensor], made: Sequence[torch.Tensor]) -> bool:
    """Whether all that it returns lies in memory that it was given, and it writes none of it: whatever its schema calls
    that (``detach`` and ``_unsafe_view`` own up to no alias)."""
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in function._schema.arguments)
    there = {tensor.untyped_storage().data_ptr() for tensor in read}
    return not writes and bool(made) and all(tensor.untyped_storage().data_ptr() in there for tensor in made)


def _allocates(function) -> bool:
    name = function.name().removeprefix("aten::").partition(".")[0]
    return name in ("new_empty", "empty_like") or not any(
        isinstance(argument.type, torch.TensorType) for argument in function._schema.arguments
    )
