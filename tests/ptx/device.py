"""A stand-in GPU: the launchers of csrc/cuda as nvcc compiled them, whose kernels' PTX is interpreted.

    with device.interpreting(x=x, A=A) as run:
        y = _cuda.lora_shrink(x, A, ...)
    run.unique(x, "read")

Launchers and bindings are linked with runtime.cpp instead of CUDA's runtime, so a launch arrives here with its kernel's
name, its grid and its arguments as the GPU would get them. Tensors are the CPU's. What torch allocates meanwhile is
known to the interpreter with exact bounds, and so are the tensors that the caller names.
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

import numpy as np
import torch
from codegen import nvcc
from codegen.sass import demangled
from ptx.execute import Counts, launch
from ptx.parse import Module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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

    launches: list[tuple[str, Counts]] = field(default_factory=list)  # demangled name without arguments
    error: Exception | None = None

    def unique(self, tensor: torch.Tensor, kind: str) -> int:
        """Bytes of a tensor that were read, or written, at least once in a launch; summed over launches."""
        return sum(buffer.unique(kind) for buffer in self._buffers(tensor))

    def requested(self, tensor: torch.Tensor, kind: str) -> int:
        return sum(buffer.requested[kind] for buffer in self._buffers(tensor))

    def executed(self, *parts: str) -> int:
        return sum(counts.executed(*parts) for _, counts in self.launches)

    def _buffers(self, tensor):
        for _, counts in self.launches:
            for buffer in counts.memory.buffers.values():
                if buffer.start == tensor.data_ptr():
                    yield buffer


class Device:
    """``module`` takes the place of `_C.cuda`."""

    def __init__(self, module, library: ctypes.CDLL, ptx: list[str]):
        self.module = module
        self._modules = [Module(text) for text in ptx]
        self._callback = Callback(self._launch)  # kept alive
        library.ptx_set_run(self._callback)
        self._run: Run | None = None
        self._known: _Allocations | None = None
        self._seed = 0

    @contextmanager
    def interpreting(self, seed: int = 0, **tensors: torch.Tensor) -> Iterator[Run]:
        """Launches are interpreted; ``seed`` draws the order of blocks and warps. Raises what a GPU would refuse."""
        self._run, self._seed, self._known = Run(), seed, _Allocations(tensors)
        try:
            with self._known:
                yield self._run
        except RuntimeError as error:
            raise (self._run.error or error) from error
        if self._run.error:
            raise self._run.error

    def _launch(self, name, grid, block, arguments, shared) -> int:
        try:
            kernel = next(m for m in self._modules if name.decode() in m.names).kernel(name.decode())
            sizes = [size for _, size in kernel.parameters.values()]
            values = [ctypes.string_at(arguments[i], size) for i, size in enumerate(sizes)]
            counts = launch(kernel, grid[:3], block[:3], values, self._known.buffers(), shared, self._seed)
            self._run.launches.append((short_name(name.decode()), counts))
        except Exception as error:  # carried over the C++ frames to `interpreting`
            self._run.error = self._run.error or error
            return 1
        return 0


class _Allocations(TorchDispatchMode):
    """Memory that kernels may touch: the named tensors, and the storage of all that torch makes meanwhile."""

    def __init__(self, named: dict[str, torch.Tensor]):
        super().__init__()
        self._named, self._made = named, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self._made += [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return result

    def buffers(self) -> dict[str, np.ndarray]:
        spans = {name: (tensor.data_ptr(), _extent(tensor)) for name, tensor in self._named.items()}
        storages = {tensor.untyped_storage().data_ptr() for tensor in self._named.values()}
        for tensor in self._made:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in storages:
                storages.add(storage.data_ptr())
                spans[f"tensor {len(spans)} {list(tensor.shape)}"] = storage.data_ptr(), storage.nbytes()
        return {name: _memory(*span) for name, span in spans.items() if span[1]}


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element to behind the last."""
    if not tensor.numel():
        return 0
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
    """The kernels of these sources."""
    objects = [nvcc.host(source) for source in nvcc.sources(csrc)]
    path = _link(csrc, objects)
    specification = importlib.util.spec_from_file_location("_emulated", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return Device(module, ctypes.CDLL(str(path)), [nvcc.ptx(source) for source in nvcc.sources(csrc)])


def _link(csrc: Path, objects: list[Path]) -> Path:
    """Launchers, bindings and runtime.cpp as a Python module."""
    import pybind11

    runtime = Path(__file__).with_name("runtime.cpp")
    known = hashlib.sha256(b"".join(p.read_bytes() for p in (csrc / "bindings.cpp", runtime, *objects)))
    path = nvcc.KEPT / f"_emulated-{known.hexdigest()[:16]}.so"
    if not path.exists():
        include = (csrc, csrc / "include", pybind11.get_include(), sysconfig.get_path("include"))
        flags = ("-std=c++17", "-O1", "-shared", "-cudart=none", "-Xcompiler=-fPIC,-fvisibility=hidden")
        sources = (csrc / "bindings.cpp", runtime, *objects)
        command = (*flags, "-DLLMBUILDER_EMULATED", *(f"-I{folder}" for folder in include), *map(str, sources))
        nvcc.make(path, nvcc.nvcc(), *command)
    return path
