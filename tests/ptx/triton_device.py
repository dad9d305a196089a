"""Triton's kernels compiled for sm_80 and their PTX interpreted, on tensors of the CPU.

    with interpreting() as run:
        S = llmbuilder.kernels.lora.lora_shrink(x, A, ...)

Triton compiles as for a GPU that is not here; what it would launch is interpreted instead, with the arguments that its
launcher would pass: those that were not compiled in, in order, and two pointers to scratch memory that no kernel of
ours has.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import triton
from codegen import nvcc
from ptx.parse import parse
from ptx.session import Run
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

SCALARS = {"i32": np.int32, "i64": np.int64, "fp32": np.float32, "fp64": np.float64, "u32": np.uint32, "i1": np.int8}


class _Driver:
    """Of a GPU that can only be compiled for."""

    def get_current_target(self):
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@contextmanager
def interpreting(seed: int = 0) -> Iterator[Run]:
    run, compile_kernel = Run(seed), JITFunction.run

    def interpret(self, *args, grid, warmup, **kwargs):
        kernel = compile_kernel(self, *args, grid=grid, warmup=True, **kwargs)
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        signature = {name: type_ for name, type_ in kernel.src.signature.items() if type_ != "constexpr"}
        values = [_argument(given[name], type_) for name, type_ in signature.items()] + [np.uint64(0)] * 2
        cells = grid(given) if callable(grid) else grid
        cells = (*cells, 1, 1)[:3]
        name, warps, shared = (getattr(kernel.metadata, key) for key in ("name", "num_warps", "shared"))
        run.launch(name, parse(kernel.asm["ptx"]), cells, (32 * warps, 1, 1), values, shared)

    def choose(self, *args, **kwargs):
        self.fn.run(*args, **kwargs, **self.configs[0].all_kwargs())

    patches = [(JITFunction, "run", interpret), (Autotuner, "run", choose), (driver, "_active", _Driver())]
    patches.append((triton.knobs.cache, "dir", str(nvcc.KEPT / "triton")))
    before = [(place, name, getattr(place, name)) for place, name, _ in patches]
    try:
        for place, name, value in patches:
            setattr(place, name, value)
        with run.knowing():
            yield run
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def _argument(value, type_):
    if isinstance(value, torch.Tensor):
        return np.uint64(value.data_ptr())
    return SCALARS[type_](value)
