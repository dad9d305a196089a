"""What the backends on a GPU share: torch's setting for tf32, and tables of addresses in the GPU's memory."""

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .errors import LLMBuilderError

Table = TypeVar("Table")
Sizes = tuple[int, ...]
Addresses = tuple[tuple[int, ...], ...]


def allows_tf32() -> bool:
    """Whether torch's setting lets products in fp32 round their operands to tf32."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # where it is there, reading the older setting can be an error
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


class Tables(Generic[Table]):
    """Tables of where an operator's tensors lie, as ``write(first tensor, sizes, addresses)`` puts them on the GPU.

    One is written for tensors in the same places, so that a step which meets them again copies nothing. The latest are
    kept, and what a CUDA graph reads at every replay is kept for as long as the process lives.
    """

    LATEST = 16

    def __init__(self, write: Callable[[Tensor, Sizes, Addresses], Table]) -> None:
        self._write = write
        self._latest: dict[Hashable, Table] = {}
        self._captured: list[Table] = []

    def of(self, *groups: Sequence[Tensor]) -> Table:
        """That of the groups' i-th tensors for each i, which are as large as the last group's; others may be empty."""
        first, sizes = groups[-1][0], tuple(tensor.numel() for tensor in groups[-1])
        addresses = tuple(tuple(tensor.data_ptr() for tensor in group) for group in groups)
        # A stream has tables of its own: the allocator hands a freed one on to work that comes later on its stream.
        key = (first.device, _stream(first), first.dtype, sizes, addresses)
        capturing = _capturing(first)
        if key not in self._latest:
            if capturing:
                raise LLMBuilderError(
                    "EWC in a CUDA graph: these tensors are met for the first time, and their table can't be written "
                    "while a graph is captured; call it once before on the same stream, and keep the gradients where "
                    "they are (zero_grad(set_to_none=False))"
                )
            if len(self._latest) == self.LATEST:
                del self._latest[next(iter(self._latest))]
            self._latest[key] = self._write(first, sizes, addresses)
        if capturing:
            self._captured.append(self._latest[key])
        return self._latest[key]


def _stream(tensor: Tensor) -> int:
    """torch's current stream on the tensor's GPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def _capturing(tensor: Tensor) -> bool:
    """Whether it is being captured."""
    if not tensor.is_cuda:
        return False
    with torch.cuda.device(tensor.device):
        return torch.cuda.is_current_stream_capturing()
