"""Launches whose kernels are interpreted on tensors of the CPU, and what they did."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
from ptx.execute import Counts, launch
from ptx.parse import Kernel
from torch import Tensor

data_ptr = Tensor.data_ptr


@dataclass
class Run:
    """A kernel may touch the tensors whose addresses were asked for within ``knowing``, and nothing else."""

    seed: int = 0  # draws the order of blocks and warps
    launches: list[tuple[str, Counts]] = field(default_factory=list)  # with the kernel's name
    error: Exception | None = None
    tensors: dict[int, Tensor] = field(default_factory=dict)

    @contextmanager
    def knowing(self) -> Iterator[None]:
        def registering(tensor: Tensor) -> int:
            self.tensors.setdefault(data_ptr(tensor), tensor)
            return data_ptr(tensor)

        with mock.patch.object(Tensor, "data_ptr", registering):
            yield

    def launch(self, name: str, kernel: Kernel, grid, block, values, shared: int) -> None:
        known = {at: tensor for at, tensor in self.tensors.items() if tensor.numel()}
        buffers = {f"{list(tensor.shape)} at {at:#x}": _memory(at, _extent(tensor)) for at, tensor in known.items()}
        self.launches.append((name, launch(kernel, grid, block, values, buffers, shared, self.seed)))

    def unique(self, tensor: Tensor, kind: str) -> int:
        """Bytes of a tensor that a launch read, or wrote, at least once; summed over launches."""
        return sum(buffer.unique(kind) for buffer in self._buffers(tensor))

    def requested(self, tensor: Tensor, kind: str, size: int = 0) -> int:
        """Bytes that lanes asked for; in accesses of that size, if given."""
        return sum(buffer.requested(kind, size) for buffer in self._buffers(tensor))

    def executed(self, *parts: str) -> int:
        """Executions by a warp of opcodes that have all these parts."""
        return sum(counts.executed(*parts) for _, counts in self.launches)

    def _buffers(self, tensor: Tensor):
        start = data_ptr(tensor)
        return [b for _, counts in self.launches for b in counts.memory.buffers.values() if b.start == start]


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _memory(address: int, size: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)
