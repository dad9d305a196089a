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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from codegen import nvcc
from codegen.sass import demangled
from gpusim.build import link, load
from ptx.parse import Module
from ptx.session import Run

from llmbuilder.ops import _backend

CSRC = nvcc.ROOT / "csrc"
Callback = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_uint64,
)


class Launch(NamedTuple):
    symbol: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int  # dynamic bytes


class Device:
    """``module`` takes the place of `_C.cuda`."""

    def __init__(self, module, library: ctypes.CDLL, ptx: list[str]):
        self.module = module
        self._modules = [Module(text) for text in ptx]
        self._callback = Callback(self._launch)  # kept alive
        library.ptx_set_run(self._callback)
        self._run = Run()
        self._noted: list[Launch] | None = None

    @contextmanager
    def interpreting(self, seed: int = 0) -> Iterator[Run]:
        """The kernels are the backend `cuda`, for tensors on the CPU. Raises PtxError for what a GPU would refuse or
        leave undefined."""
        self._run = Run(seed)
        try:
            with _backend.emulated(self.module), self._run.knowing():
                yield self._run
        except RuntimeError as error:
            raise (self._run.error or error) from error

    @contextmanager
    def recording(self) -> Iterator[list[Launch]]:
        """Launches are noted, and nothing is run."""
        self._noted = []
        try:
            with _backend.emulated(self.module):
                yield self._noted
        finally:
            self._noted = None

    def _launch(self, name, grid, block, arguments, shared) -> int:
        try:
            symbol = name.decode()
            if self._noted is not None:
                self._noted.append(Launch(symbol, tuple(grid[:3]), tuple(block[:3]), shared))
                return 0
            kernel = next(m for m in self._modules if symbol in m.names).kernel(symbol)
            values = [ctypes.string_at(arguments[i], size) for i, (_, size) in enumerate(kernel.parameters.values())]
            self._run.launch(short_name(symbol), kernel, grid[:3], block[:3], values, shared)
        except Exception as error:  # carried over the C++ frames to `interpreting`
            self._run.error = self._run.error or error
            return 1
        return 0


@functools.cache
def short_name(symbol: str) -> str:
    """ "shrink_kernel" of a mangled name."""
    return demangled([symbol])[0].partition("<")[0].partition("(")[0].split("::")[-1].split()[-1]


@functools.cache
def device(csrc: Path = CSRC, only: str = "") -> Device:
    """Of the kernels in csrc/cuda, or of ``only`` one operator's."""
    sources = [source for source in nvcc.sources(csrc) if only in ("", source.stem)]
    objects = nvcc.each(nvcc.host, sources)
    path = link([csrc / "bindings.cpp", Path(__file__).with_name("runtime.cpp")], objects.values(), nvcc.KEPT)
    return Device(load(path), ctypes.CDLL(str(path)), [nvcc.ptx(source) for source in objects])
