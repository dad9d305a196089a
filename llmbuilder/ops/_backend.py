"""Who serves which operator here, and why another does not.

One row an operator, one column a backend. A backend is a module whose functions carry the operators' names, and a
predicate that says why it can't serve; adding one changes nothing but this file.
`LLMBUILDER_BACKEND=cuda|triton|cpu|reference` forces one; where it can't serve, that is an error.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LLMBuilderError, nearest
from . import _cuda, _native

VARIABLE = "LLMBUILDER_BACKEND"
CAPABILITY = (8, 0)  # the least compute capability of an NVIDIA GPU: bf16 and mma.sync m16n8k16 begin there


@dataclass(frozen=True)
class Served:
    """One row of ``explain``: who serves the operator (None: the forced one can't), and why the others do not."""

    operator: str
    backend: str | None
    why_not: dict[str, str]


def _cuda_unfit(device: torch.device, dtype: torch.dtype) -> str:
    if not _cuda.available():
        return _cuda.why_not()
    if device.type != _cuda.device_type():
        return f"the tensor is on {device.type}"
    if dtype not in _cuda.DTYPES:
        return f"no kernels for {_short(dtype)}"
    return _cuda.unfit_driver() or _unfit_gpu(device) or _cuda.unfit_code(device)


def _triton_unfit(device: torch.device, dtype: torch.dtype) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install 'llmbuilder[triton]'` brings it"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton's kernels run on a GPU, the tensor is on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no kernels for {_short(dtype)}"
    return _unfit_gpu(device)


def _cpu_unfit(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cpu":
        return f"the tensor is on {device.type}"
    if not _native.available():
        return _native.why_not()
    return "" if _native.serves(dtype) else f"no kernels for {_short(dtype)}"


def _unfit_gpu(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        needed = ".".join(map(str, CAPABILITY))
        return f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, below {needed}"
    return ""


# In the order of preference; the function says why a backend serves no such tensor, and nothing when it does.
BACKENDS: dict[str, Callable[[torch.device, torch.dtype], str]] = {
    "cuda": _cuda_unfit,
    "cpu": _cpu_unfit,
    "triton": _triton_unfit,
    "reference": lambda device, dtype: "",
}
_ALL = {"cuda": "ops._cuda", "cpu": "ops._cpu", "reference": "ops.reference"}
_BASE_FIRST = {"cpu": "ops._cpu", "reference": "ops.reference"}
_UPDATE_FIRST = {"cuda": "ops._cuda", "triton": "kernels.lora"}
OPERATORS: dict[str, dict[str, str]] = {
    "dropout": _ALL | {"triton": "kernels.dropout"},
    "lora_shrink": _ALL | {"triton": "kernels.lora"},
    "lora_expand": _UPDATE_FIRST,
    "lora_expand_": _BASE_FIRST,
    "lora_grad_sb": _ALL | {"triton": "kernels.lora"},
    "lora_grad_ax": _UPDATE_FIRST,
    "lora_grad_ax_": _BASE_FIRST,
    "lora_fused": _UPDATE_FIRST,
    "lora_fused_grad": _UPDATE_FIRST,
    "ewc_penalty_": _ALL | {"triton": "kernels.ewc"},
    "ewc_accumulate_": _ALL | {"triton": "kernels.ewc"},
    "softmax_cross_entropy_": _ALL | {"triton": "kernels.cross_entropy"},
}


def serve(operator: str, tensor: Tensor) -> Callable[..., Any]:
    """The function that computes ``operator`` on tensors of this one's device and dtype."""
    name = _choose(operator, tensor.device, tensor.dtype, os.environ.get(VARIABLE))
    return _function(operator, name)


def update_first(tensor: Tensor) -> bool:
    """Whether a LoRA layer on such tensors writes its update first and adds the base to it, or the other way round."""
    return _choose("lora_shrink", tensor.device, tensor.dtype, os.environ.get(VARIABLE)) in _UPDATE_FIRST


def explain(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Served]:
    """Who serves each operator on tensors of this device and dtype, and why every other backend does not.

    An operator that belongs to the other order of a LoRA layer's sums has no row.
    """
    place, forced = torch.device(device), _forced(os.environ.get(VARIABLE))
    unfit = {name: why_not(place, dtype) for name, why_not in BACKENDS.items()}

    def chosen(operator: str) -> str | None:
        names = [forced] if forced else BACKENDS
        return next((name for name in names if not (unfit[name] or _lacks(operator, name))), None)

    order = chosen("lora_shrink") or forced
    rows = []
    for operator, modules in OPERATORS.items():
        if modules in (_BASE_FIRST, _UPDATE_FIRST) and order not in modules:
            continue
        served = chosen(operator)
        preferred = f"{VARIABLE}={forced} forces another" if forced else f"{served} comes first"
        others = [name for name in BACKENDS if name != served]
        rows.append(
            Served(operator, served, {name: unfit[name] or _lacks(operator, name) or preferred for name in others})
        )
    return rows


@contextmanager
def emulated(module: Any) -> Iterator[None]:
    """For tests: ``module``, the CUDA kernels built for the CPU, stands in the place of those for a GPU."""
    _choose.cache_clear()
    try:
        with _cuda.replaced(module):
            yield
    finally:
        _choose.cache_clear()


@functools.cache
def _choose(operator: str, device: torch.device, dtype: torch.dtype, variable: str | None) -> str:
    forced = _forced(variable)
    for name in [forced] if forced else BACKENDS:
        why_not = BACKENDS[name](device, dtype) or _lacks(operator, name)
        if not why_not:
            return name
        if forced:
            raise LLMBuilderError(f"{operator}: {VARIABLE}={forced} can't serve it: {why_not}; unset {VARIABLE}")
    raise AssertionError(f"nobody serves {operator}")


@functools.cache
def _function(operator: str, backend: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"llmbuilder.{OPERATORS[operator][backend]}"), operator)


def _forced(variable: str | None) -> str | None:
    if variable and variable not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise LLMBuilderError(f"{VARIABLE}={variable} names no backend, only {known} do{nearest(variable, BACKENDS)}")
    return variable or None


def _lacks(operator: str, backend: str) -> str:
    return "" if backend in OPERATORS[operator] else f"it has no {operator}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
