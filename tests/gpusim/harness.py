"""The emulated kernels in this process: buffers to keep to, schedules, and what each launch did.

    emulator = Emulator(build())
    with emulator.serving(), emulator.recording(x=x) as launches:      # `cuda` now runs on CPU tensors
        y = llmbuilder.ops.dropout(x, 0.1)
    launches[0].traffic["x"].unique_read == x.nbytes

While it serves, a kernel may touch the memory of those tensors alone whose address it was given, row by row; and each
call of a launcher is watched by the recording runtime (record.py), as if work went to a stream of a second GPU.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from gpusim.record import KERNELS, STREAMS, Recorder
from torch import Tensor

_address = Tensor.data_ptr  # the true one, also while an emulator serves

# What a block may have of shared memory, with opt-in, by compute capability (CUDA C++ Programming Guide, table of
# technical specifications).
SHARED_LIMITS = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

DEVICE, STREAM = 1, STREAMS + 7  # where work goes while an emulator serves; device 0 is current

# What has the host wait for a GPU's result, or copy from memory that a graph would not find again.
WAITING = {
    Tensor: ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"),
    torch: ("equal", "nonzero", "tensor"),
}


@dataclass(frozen=True)
class Traffic:
    """What a launch did in one buffer: bytes asked for, and different ones among them."""

    bytes_read: int
    bytes_written: int
    unique_read: int
    unique_written: int


@dataclass(frozen=True)
class Launch:
    """What one launch was and did; docs in tests/gpusim/runtime.h."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    dynamic_shared: int
    static_shared: int
    mma: int
    shuffles: int
    barriers: int
    ldmatrix: int
    ldmatrix_conflicts: int
    copies: int
    traffic: dict[str, Traffic]


class Emulator:
    """A library that ``build`` made."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))
        self.recorder = Recorder(path)
        for name in ("gpusim_kernel", "gpusim_buffer"):
            getattr(self._library, name).restype = ctypes.c_char_p
        for name in ("gpusim_launches", "gpusim_buffers"):
            getattr(self._library, name).restype = ctypes.c_uint64
        self._names: dict[int, str] = {}

    @property
    def library(self) -> ctypes.CDLL:
        """For functions with plain C names."""
        return self._library

    def module(self) -> ModuleType:
        """What stands for ``_C.cuda``: the bindings, each launcher watched, after each call of which registered
        buffers are forgotten."""
        module = self.recorder.watched()
        for name in KERNELS:
            setattr(module, name, self._forgetting(getattr(module, name)))
        return module

    def _forgetting(self, launcher: Callable) -> Callable:
        def call(*arguments: Any) -> Any:
            try:
                return launcher(*arguments)
            finally:
                self.forget()

        return call

    @contextmanager
    def serving(self) -> Iterator[None]:
        """The kernels are the backend `cuda`, for tensors on the CPU; what they are given to fill is full of NaN."""
        from llmbuilder.ops import _backend, _cuda

        def registering(tensor: Tensor) -> int:
            self.register(tensor)
            return _address(tensor)

        with ExitStack() as stack:
            stack.enter_context(_backend.emulated(self.module()))
            stack.enter_context(mock.patch.object(_cuda, "_at", lambda tensor: (DEVICE, STREAM)))
            stack.enter_context(mock.patch.object(Tensor, "data_ptr", registering))
            for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
                stack.enter_context(mock.patch.object(owner, name, _poisoning(getattr(owner, name))))
            stack.callback(self.forget)
            yield

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """The stream is captured in a graph: launchers may launch alone, and nobody may look at a result. Kernels run
        all the same."""
        from llmbuilder import _gpu

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(_gpu, "_capturing", lambda tensor: True))
            for owner, names in WAITING.items():
                for name in names:
                    stack.enter_context(mock.patch.object(owner, name, _refused(name)))
            self.recorder.capture(STREAM)
            stack.callback(self.recorder.capture, None)
            yield

    def register(self, tensor: Tensor, name: str | None = None) -> None:
        """Kernels may touch this tensor. A matrix whose rows lie apart is known row by row, others from their first
        element to their last."""
        address, size = _address(tensor), tensor.element_size()
        if tensor.numel() == 0:
            return
        if tensor.dim() == 2 and tensor.stride(1) == 1 and tensor.stride(0) > tensor.shape[1]:
            rows, row_bytes, stride = tensor.shape[0], tensor.shape[1] * size, tensor.stride(0) * size
        else:
            rows = 1
            last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
            row_bytes = stride = (last + 1) * size
        name = name or self._names.get(address) or f"{tensor.dtype}{list(tensor.shape)}".removeprefix("torch.")
        self._library.gpusim_register(name.encode(), *map(ctypes.c_uint64, (address, rows, row_bytes, stride)))

    def forget(self) -> None:
        """No buffer is registered."""
        self._library.gpusim_forget()

    def schedule(self, seed: int) -> None:
        """In which order threads and blocks run; 0: in their own."""
        self._library.gpusim_seed(ctypes.c_uint64(seed))

    def target(self, capability: int) -> None:
        """Shared memory of the GPU that is emulated, as 80, 86, 89, 90, 100 or 120."""
        self.recorder.shared_limit(SHARED_LIMITS[capability])

    @contextmanager
    def recording(self, **tensors: Tensor) -> Iterator[list[Launch]]:
        """Launches made in the context, in the list when it ends.

        Traffic is listed by the names of these tensors, or by dtype and shape.
        """
        launches: list[Launch] = []
        self._names = {_address(tensor): name for name, tensor in tensors.items()}
        self._library.gpusim_record(1)
        try:
            yield launches
        finally:
            launches += [self._launch(i) for i in range(self._library.gpusim_launches())]
            self._library.gpusim_record(0)
            self._names = {}

    def _launch(self, i: int) -> Launch:
        index, counts = ctypes.c_uint64(i), (ctypes.c_uint64 * 14)()
        self._library.gpusim_counts(index, counts)
        numbers = list(counts)
        traffic: dict[str, Traffic] = {}
        for j in map(ctypes.c_uint64, range(self._library.gpusim_buffers(index))):
            of_buffer = (ctypes.c_uint64 * 4)()
            self._library.gpusim_traffic(index, j, of_buffer)
            name = self._library.gpusim_buffer(index, j).decode()
            while name in traffic:
                name += "'"
            traffic[name] = Traffic(*of_buffer)
        kernel = self._library.gpusim_kernel(index).decode()
        return Launch(kernel, tuple(numbers[:3]), tuple(numbers[3:6]), *numbers[6:], traffic)


def _poisoning(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*arguments: Any, **options: Any) -> Tensor:
        tensor = empty(*arguments, **options)
        if type(tensor) is Tensor and tensor.device.type == "cpu":
            tensor.untyped_storage().fill_(0xFF)
        return tensor

    return call


def _refused(name: str) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{name} while a stream is captured: no graph can do that")

    return call


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor for a kernel to fill: NaN, or the bits of one, everywhere."""
    tensor = torch.empty(*shape, dtype=dtype)
    tensor.view(torch.uint8).fill_(0xFF)
    return tensor
