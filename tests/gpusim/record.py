"""The launchers as nvcc compiles them, over a recording stand-in for the CUDA runtime (recorder.cpp): which kernels
they put where, and that they call nothing that allocates, copies or waits. No kernel runs.

    recorder = Recorder(build())
    recorder.module.dropout(..., 1, 256)          # the bindings of `_C.cuda`; stream 256 is one of device 1
    recorder.launches()[0].kernel
"""

import ctypes
import re
import subprocess
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from codegen import nvcc
from codegen.sass import demangled
from gpusim import build as emulated

HERE = Path(__file__).parent
SOURCES = [HERE / "recorder.cpp", emulated.ROOT / "csrc" / "bindings.cpp"]
STREAMS = 256  # of each device
# All that launchers and the code that nvcc adds to them may call of the runtime.
ALLOWED = {"cudaGetDevice", "cudaSetDevice", "cudaFuncSetAttribute", "cudaStreamIsCapturing", "cudaGetLastError"}
ALLOWED |= {"cudaGetErrorString", "cudaLaunchKernel", "__cudaLaunchKernel", "__cudaGetKernel", "__cudaInitModule"}
ALLOWED |= {"__cudaRegisterFatBinary", "__cudaRegisterFatBinaryEnd", "__cudaUnregisterFatBinary"}
ALLOWED |= {"__cudaRegisterFunction"}
ALLOWED |= {"__cudaPopCallConfiguration"}  # in the stub of every kernel, which only kernel<<<>>> calls


@dataclass(frozen=True)
class Launch:
    """A kernel that a launcher put on a stream."""

    symbol: str
    kernel: str  # the symbol, demangled
    device: int
    stream: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    error: int


def objects(csrc: Path = emulated.ROOT / "csrc") -> list[Path]:
    """What nvcc makes of csrc/cuda/*.cu."""
    return list(nvcc.each(nvcc.host, nvcc.sources(csrc)).values())


def build(cache: Path = emulated.ROOT / "build" / "emulated") -> Path:
    """The module: launchers, bindings and recorder.cpp."""
    return emulated.link(SOURCES, objects(), cache)


def called(objects: list[Path]) -> set[str]:
    """The functions of CUDA that these objects call."""
    listed = subprocess.run(["nm", "-u", *map(str, objects)], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\bU ((?:__)?cu\w+)", listed))


class Recorder:
    """A library that ``build`` made."""

    def __init__(self, path: Path):
        self.module = emulated.load(path)
        self._library = ctypes.CDLL(str(path))
        self._library.recorder_events.restype = ctypes.c_char_p

    def serving(self) -> AbstractContextManager[None]:
        """The launchers are the backend `cuda`, for tensors on the CPU, and nothing is computed."""
        from llmbuilder.ops import _backend

        return _backend.emulated(self.module)

    def clear(self) -> None:
        self._library.recorder_clear()

    def events(self) -> list[list[str]]:
        """Calls since clear(), as words: launch, attribute, set_device, ...; the last is the error returned."""
        return [line.split("\t") for line in self._library.recorder_events().decode().splitlines()]

    def launches(self) -> list[Launch]:
        return [_launch(words) for words in self.events() if words[0] == "launch"]

    def forbidden(self) -> list[str]:
        """Calls of what allocates, copies or waits."""
        return [words[1] for words in self.events() if words[0] == "forbidden"]

    def capture(self, stream: int | None) -> None:
        """This stream is captured; None: no stream is."""
        self._library.recorder_capture(ctypes.c_uint64(2**64 - 1 if stream is None else stream))

    def fail(self, function: str, error: int) -> None:
        """The function returns this error from now on; 0: no longer."""
        self._library.recorder_fail(function.encode(), error)

    def device(self) -> int:
        """The current one."""
        return self._library.recorder_device()

    def last_error(self) -> int:
        """What cudaGetLastError would say."""
        return self._library.recorder_last_error()


def _launch(words: list[str]) -> Launch:
    _, name, device, stream, grid, block, shared, error = words
    x, y = (tuple(map(int, triple.split(","))) for triple in (grid, block))
    return Launch(name, demangled([name])[0], int(device), int(stream), x, y, int(shared), int(error))
