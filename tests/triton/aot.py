"""Compiles the kernels that an operator launches, for any architecture, without a GPU or a driver; launches nothing.

    with aot.target(90) as kernels:
        lora.lora_shrink(x, A, threshold, seed, stream)     # tensors on the CPU, whose values nobody reads
    kernels[0].sass.registers

So what is compiled is what the operator would launch: its constants, its types, the alignment of its arguments. Code is
kept by content in Triton's own way, under build/codegen/triton.
"""

import hashlib
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import triton
from codegen import sass
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
PINNED = "3.9.0"  # the Triton whose code the committed table describes
KEPT = Path(__file__).parents[2] / "build/codegen/triton"


@dataclass(frozen=True)
class Compiled:
    """One kernel that an operator would have launched."""

    name: str
    architecture: int
    warps: int
    shared: int  # bytes, all of them
    ptx: str
    sass: sass.Kernel

    @property
    def threads(self) -> int:
        return 32 * self.warps


class Driver:
    """Stands in for the driver of a GPU: says which it is, and has no function to run anything on it."""

    def __init__(self, architecture):
        self.architecture = architecture

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return self.architecture  # Triton remembers what it compiled by device

    def get_current_stream(self, device):
        return 0


@contextmanager
def target(architecture, config=0):
    """A list, to which each launch within adds its kernel, compiled with this one of the configs it is tuned over."""
    compiled, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append(_read(run(self, *args, grid=grid, warmup=True, **kwargs), architecture))

    def choose(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        fit = self.prune_configs(kwargs)
        self.fn.run(*args, **kwargs, **fit[min(config, len(fit) - 1)].all_kwargs())

    patches = [
        (JITFunction, "run", compile_only),
        (Autotuner, "run", choose),
        (driver, "_active", Driver(architecture)),
    ]
    patches.append((triton.knobs.cache, "dir", str(KEPT)))
    before = [(place, name, getattr(place, name)) for place, name, _ in patches]
    try:
        for place, name, value in patches:
            setattr(place, name, value)
        yield compiled
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def _read(kernel, architecture):
    cubin = kernel.asm["cubin"]
    path = KEPT / f"{hashlib.sha256(cubin).hexdigest()[:16]}.cubin"
    if not path.exists():
        path.write_bytes(cubin)
    (code,) = sass.kernels(path)
    metadata = kernel.metadata
    return Compiled(metadata.name, architecture, metadata.num_warps, metadata.shared, kernel.asm["ptx"], code)


def wide_multiplies(kernel):
    """32 x 32 bit products with a high word, a thread: two a round of Philox, 14 a call that serves eight elements."""
    return len(re.findall(r"mul\.(?:hi|wide)\.u32", kernel.ptx))
