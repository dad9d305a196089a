"""What launchers ask of CUDA's runtime, recorded by a stand-in for it (recorder.cpp), and what they must not.

    recorder = Recorder(build())
    recorder.module.dropout(..., 1, 256)          # the bindings of `_C.cuda`; stream 256 is one of device 1
    recorder.launches()[0].kernel

``build`` has the launchers as nvcc compiles them, and no kernel runs. gpusim/build.py has them as g++ does, with the
emulator to run the kernels, and ptx/device.py has nvcc's with the kernels' PTX interpreted.
"""

import ctypes
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from codegen import nvcc
from codegen.sass import demangled
from gpusim import build as emulated

HERE = Path(__file__).parent
CSRC = emulated.ROOT / "csrc"
STREAMS = 256  # of each device
# All that launchers and the code that nvcc adds to them may call of the runtime.
ALLOWED = {"cudaGetDevice", "cudaSetDevice", "cudaFuncSetAttribute", "cudaStreamIsCapturing", "cudaGetLastError"}
ALLOWED |= {"cudaGetErrorString", "cudaLaunchKernel", "__cudaLaunchKernel", "__cudaGetKernel", "__cudaInitModule"}
ALLOWED |= {"__cudaRegisterFatBinary", "__cudaRegisterFatBinaryEnd", "__cudaUnregisterFatBinary"}
ALLOWED |= {"__cudaRegisterFunction"}
ALLOWED |= {"__cudaPopCallConfiguration"}  # in the stub of every kernel, which only kernel<<<>>> calls
# What is left of it while a stream is captured.
ALLOWED_IN_CAPTURE = {"get_device", "set_device", "launch"}

# The kernels that a call of each launcher is made of; of the gradients' once more for every 256 ranks beyond the first
# (128 in fp32). Where there is nothing to do it can be fewer, or none.
KERNELS = {
    "dropout": "dropout",
    "dropout_mask": "dropout_mask",
    "lora_shrink": "shrink( add_up)?",
    "lora_expand": "expand",
    "lora_grad_sb": "(grad_sb|grad_side( grad_side)?) add_up_both",
    "lora_grad_ax": "grad_ax add_up",
    "lora_fused": "fused",
    "lora_fused_grad": "fused",
    "ewc_penalty": "(penalty )?sum",
    "ewc_accumulate": "accumulate",
    "softmax_cross_entropy": "cross_entropy",
}
IN_RUNS = {"lora_grad_sb", "lora_grad_ax"}


@dataclass(frozen=True)
class Launch:
    """A kernel that a launcher put on a stream."""

    symbol: str  # what nvcc made of the name and its template arguments; g++'s kernels are known by names alone
    device: int
    stream: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    error: int

    @property
    def kernel(self) -> str:
        """The symbol, demangled."""
        return demangled([self.symbol])[0]

    @property
    def name(self) -> str:
        """ "shrink" of shrink_kernel<...>."""
        return re.search("([a-z_]+)_kernel(?![a-z_])", self.symbol)[1]


class LauncherError(AssertionError):
    """A launcher did what none may do."""


class ToRun(ctypes.Structure):
    """recorder::Launch."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("kernel", ctypes.c_void_p),
        ("body", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("shared", ctypes.c_uint64),
        ("shared_limit", ctypes.c_uint64),
    )


RUN = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ToRun))


def objects(csrc: Path = CSRC, only: str = "") -> list[Path]:
    """What nvcc makes of csrc/cuda/*.cu, or of ``only`` one of them."""
    return list(nvcc.each(nvcc.host, [s for s in nvcc.sources(csrc) if only in ("", s.stem)]).values())


def build(csrc: Path = CSRC, only: str = "") -> Path:
    """The module: launchers, bindings and recorder.cpp."""
    return emulated.link([HERE / "recorder.cpp", csrc / "bindings.cpp"], objects(csrc, only), nvcc.KEPT)


def called(objects: list[Path]) -> set[str]:
    """The functions of CUDA that these objects call."""
    listed = subprocess.run(["nm", "-u", *map(str, objects)], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\bU ((?:__)?cu\w+)", listed))


class Recorder:
    """A library that has recorder.cpp in it."""

    def __init__(self, path: Path):
        self._path = path
        self._library = ctypes.CDLL(str(path))
        self._library.recorder_events.restype = ctypes.c_char_p
        self._library.recorder_set_run.restype = ctypes.c_void_p
        self._captured: int | None = None
        self.launched: Counter[str] = Counter()  # kernels of the launchers that were watched

    @cached_property
    def module(self) -> ModuleType:
        return emulated.load(self._path)

    def watched(self) -> ModuleType:
        """The module, each call of whose launchers is watched."""

        def watched(name: str, launcher: Callable[..., None]) -> Callable[..., None]:
            def call(*arguments: Any) -> None:
                with self.watching(name, *arguments[-2:]):
                    launcher(*arguments)

            return call

        module = ModuleType("_watched")
        for name, value in vars(self.module).items():
            setattr(module, name, watched(name, value) if name in KERNELS else value)
        return module

    def serving(self) -> AbstractContextManager[None]:
        """The launchers, watched, are the backend `cuda`, for tensors on the CPU."""
        from llmbuilder.ops import _backend

        return _backend.emulated(self.watched())

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
        self._captured = stream
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

    def shared_limit(self, size: int) -> None:
        """What a block may have of shared memory, with opt-in."""
        self._library.recorder_shared_limit(ctypes.c_uint64(size))

    @contextmanager
    def run_by(self, run: Any) -> Iterator[None]:
        """Kernels are run by this RUN, or by nobody."""
        before = self._library.recorder_set_run(run)
        try:
            yield
        finally:
            self._library.recorder_set_run(ctypes.c_void_p(before))

    @contextmanager
    def watching(self, launcher: str, device: int, stream: int) -> Iterator[None]:
        """For one call of a launcher: LauncherError unless it has put its kernels there, and done nothing else."""
        self.clear()
        before = self.device()
        yield
        launches, events = self.launches(), self.events()
        kernels = " ".join(launch.name for launch in launches)
        wrong = [f"calls {function}" for function in self.forbidden()]
        wrong += [
            f"puts {launch.name} on stream {launch.stream} of device {launch.device}, not {stream} of {device}"
            for launch in launches
            if (launch.device, launch.stream) != (device, stream)
        ]
        wrong += [f"goes on after an error: {' '.join(words)}" for words in events if words[-1] != "0"]
        if self.device() != before:
            wrong.append(f"leaves device {self.device()} current, which was {before}")
        if launches and not re.fullmatch(_kernels_of(launcher), kernels):
            wrong.append(f"launches {kernels}")
        if self._captured == stream:
            asked = {words[0] for words in events} - ALLOWED_IN_CAPTURE
            wrong += [f"asks for {function} while it is captured" for function in sorted(asked)]
        if wrong:
            raise LauncherError(f"{launcher} " + "; ".join(wrong))
        self.launched[launcher] += len(launches)


def _kernels_of(launcher: str) -> str:
    once = KERNELS[launcher]
    return f"{once}( {once})*" if launcher in IN_RUNS else once


def _launch(words: list[str]) -> Launch:
    _, name, device, stream, grid, block, shared, error = words
    x, y = (tuple(map(int, triple.split(","))) for triple in (grid, block))
    return Launch(name, int(device), int(stream), x, y, int(shared), int(error))
