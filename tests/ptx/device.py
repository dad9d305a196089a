"""A stand-in GPU: the launchers of csrc/cuda as nvcc compiled them, whose kernels' PTX is interpreted.

    with device().interpreting() as run:
        S = ops._cuda.lora_shrink(x, A, ...)         # tensors on the CPU
    run.unique(x, "read")

Launchers and bindings are linked with the recording runtime of gpusim/recorder.cpp instead of CUDA's, so a launch
arrives here with its kernel's name, its grid and its arguments as a GPU would get them. A kernel may touch the tensors
whose addresses were asked for in the context, and nothing else.
"""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from codegen import nvcc
from codegen.sass import demangled
from gpusim import record
from ptx.parse import Module
from ptx.session import Run

FAILED = 719  # cudaErrorLaunchFailure


class Device:
    """A library of nvcc's launchers, and the PTX of their kernels."""

    def __init__(self, path: Path, ptx: list[str]):
        self.recorder = record.Recorder(path)
        self._modules = [Module(text) for text in ptx]
        self._callback = record.RUN(self._launch)
        self._run = Run()

    @contextmanager
    def interpreting(self, seed: int = 0) -> Iterator[Run]:
        """The kernels are the backend `cuda`, for tensors on the CPU. Raises PtxError for what a GPU would refuse or
        leave undefined."""
        self._run = Run(seed)
        try:
            with self.recorder.serving(), self.recorder.run_by(self._callback), self._run.knowing():
                yield self._run
        except RuntimeError as error:
            raise (self._run.error or error) from error

    def _launch(self, launch) -> int:
        try:
            of = launch.contents
            symbol = of.name.decode()
            kernel = next(m for m in self._modules if symbol in m.names).kernel(symbol)
            sizes = [size for _, size in kernel.parameters.values()]
            values = [ctypes.string_at(of.arguments[i], size) for i, size in enumerate(sizes)]
            self._run.launch(short_name(symbol), kernel, of.grid[:], of.block[:], values, of.shared)
        except Exception as error:  # carried over the C++ frames to `interpreting`
            self._run.error = self._run.error or error
            return FAILED
        return 0


@functools.cache
def short_name(symbol: str) -> str:
    """ "shrink_kernel" of a mangled name."""
    return demangled([symbol])[0].partition("<")[0].partition("(")[0].split("::")[-1].split()[-1]


@functools.cache
def device(csrc: Path = record.CSRC, only: str = "") -> Device:
    """Of the kernels in csrc/cuda, or of ``only`` one operator's."""
    sources = [source for source in nvcc.sources(csrc) if only in ("", source.stem)]
    return Device(record.build(csrc, only), [nvcc.ptx(source) for source in sources])
