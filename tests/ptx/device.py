"""A stand-in GPU: the launchers of csrc/cuda as nvcc compiled them, whose kernels' PTX is interpreted.

    with device().interpreting() as run:
        S = ops._cuda.lora_shrink(x, A, ...)         # tensors on the CPU
    run.unique(x, "read")

Launchers and bindings are linked with runtime.cpp instead of CUDA's runtime, so a launch arrives here with its kernel's
name, its grid and its arguments as a GPU would get them. A kernel may touch the tensors whose addresses were asked for
in the context, and nothing else.
"""

import ctypes
import functools
import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
from codegen import nvcc
from codegen.sass import demangled
from ptx.execute import Counts, launch
from ptx.parse import Module
from torch import Tensor

from llmbuilder.ops import _backend

data_ptr = Tensor.data_ptr

Callback = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_uint64,
)


@dataclass
class Run:
    """The launches within ``interpreting``."""

    launches: list[tuple[str, Counts]] = field(default_factory=list)  # with the kernel's name
    error: Exception | None = None

    def unique(self, tensor: Tensor, kind: str) -> int:
        """Bytes of a tensor that a launch read, or wrote, at least once; summed over launches."""
        return sum(buffer.unique(kind) for buffer in self._buffers(tensor))

    def requested(self, tensor: Tensor, kind: str) -> int:
        """Bytes that the lanes asked for."""
        return sum(buffer.requested[kind] for buffer in self._buffers(tensor))

    def executed(self, *parts: str) -> int:
        """Executions by a warp of opcodes that have all these parts."""
        return sum(counts.executed(*parts) for _, counts in self.launches)

    def _buffers(self, tensor: Tensor):
        start = data_ptr(tensor)
        return [b for _, counts in self.launches for b in counts.memory.buffers.values() if b.start == start]


class Device:
    """``module`` takes the place of `_C.cuda`."""

    def __init__(self, module, library: ctypes.CDLL, ptx: list[str]):
        self.module = module
        self._modules = [Module(text) for text in ptx]
        self._callback = Callback(self._launch)  # kept alive
        library.ptx_set_run(self._callback)
        self._run = Run()
        self._tensors: dict[int, Tensor] = {}
        self._seed = 0

    @contextmanager
    def interpreting(self, seed: int = 0) -> Iterator[Run]:
        """The kernels are the backend `cuda`, for tensors on the CPU; ``seed`` draws the order of blocks and warps.

        Raises PtxError for what a GPU would refuse or leave undefined.
        """
        self._run, self._seed, self._tensors = Run(), seed, {}

        def registering(tensor: Tensor) -> int:
            self._tensors.setdefault(data_ptr(tensor), tensor)
            return data_ptr(tensor)

        try:
            with _backend.emulated(self.module), mock.patch.object(Tensor, "data_ptr", registering):
                yield self._run
        except RuntimeError as error:
            raise (self._run.error or error) from error

    def _launch(self, name, grid, block, arguments, shared) -> int:
        try:
            symbol = name.decode()
            kernel = next(m for m in self._modules if symbol in m.names).kernel(symbol)
            values = [ctypes.string_at(arguments[i], size) for i, (_, size) in enumerate(kernel.parameters.values())]
            buffers = {
                f"{list(t.shape)} at {at:#x}": _memory(at, _extent(t)) for at, t in self._tensors.items() if t.numel()
            }
            counts = launch(kernel, grid[:3], block[:3], values, buffers, shared, self._seed)
            self._run.launches.append((short_name(symbol), counts))
        except Exception as error:  # carried over the C++ frames to `interpreting`
            self._run.error = self._run.error or error
            return 1
        return 0

    def _buffers(self) -> dict[str, np.ndarray]:
        known = {at: tensor for at, tensor in self._tensors.items() if tensor.numel()}
        return {f"{list(tensor.shape)} at {at:#x}": _memory(at, _extent(tensor)) for at, tensor in known.items()}


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _memory(address: int, size: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)


@functools.cache
def short_name(symbol: str) -> str:
    """ "shrink_kernel" of a mangled name."""
    return demangled([symbol])[0].partition("<")[0].partition("(")[0].split("::")[-1].split()[-1]


@functools.cache
def device(csrc: Path = nvcc.ROOT / "csrc") -> Device:
    """Of the kernels in csrc/cuda."""
    objects = nvcc.each(nvcc.host, csrc)
    path = _link(csrc, list(objects.values()))
    specification = importlib.util.spec_from_file_location("_emulated", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return Device(module, ctypes.CDLL(str(path)), [nvcc.ptx(source) for source in objects])


def _link(csrc: Path, objects: list[Path]) -> Path:
    """Launchers, bindings and runtime.cpp as a Python module."""
    import pybind11

    runtime = Path(__file__).with_name("runtime.cpp")
    known = hashlib.sha256(b"".join(p.read_bytes() for p in (csrc / "bindings.cpp", runtime, *objects)))
    path = nvcc.KEPT / f"_emulated-{known.hexdigest()[:16]}.so"
    if not path.exists():
        include = (csrc, csrc / "include", pybind11.get_include(), sysconfig.get_path("include"))
        flags = ("-std=c++17", "-O1", "-shared", "-cudart=none", "-Xcompiler=-fPIC,-fvisibility=hidden")
        sources = (csrc / "bindings.cpp", csrc / "cuda/version.cpp", runtime, *objects)
        command = (*flags, "-DLLMBUILDER_EMULATED", *(f"-I{folder}" for folder in include), *map(str, sources))
        nvcc.make(path, nvcc.nvcc(), *command)
    return path
