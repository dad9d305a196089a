"""Who serves which operator here, and why another does not.

One row an operator, one column a backend. A backend is a module whose functions carry the operators' names, and a
predicate that says why it can't serve; adding one changes nothing but this file.
`LLMBUILDER_BACKEND=cuda|triton|cpu|reference` forces one; where it can't serve, that is an error.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LLMBuilderError, nearest
from . import _native

VARIABLE = "LLMBUILDER_BACKEND"


@dataclass(frozen=True)
class Served:
    """One row of ``explain``: who serves the operator (None: the forced one can't), and why the others do not."""

    operator: str
    backend: str | None
    why_not: dict[str, str]


def _cuda_unfit(device: str, dtype: torch.dtype) -> str:
    return "this version has no CUDA kernels"


def _triton_unfit(device: str, dtype: torch.dtype) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install 'llmbuilder[triton]'` brings it"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton's kernels run on a GPU, the tensor is on {device}"
    return "" if dtype in (torch.float32, torch.bfloat16, torch.float16) else f"no kernels for {_short(dtype)}"


def _cpu_unfit(device: str, dtype: torch.dtype) -> str:
    if device != "cpu":
        return f"the tensor is on {device}"
    if not _native.available():
        return _native.why_not()
    return "" if _native.serves(dtype) else f"no kernels for {_short(dtype)}"


# In the order of preference; the function says why a backend serves no such tensor, and nothing when it does.
BACKENDS: dict[str, Callable[[str, torch.dtype], str]] = {
    "cuda": _cuda_unfit,
    "cpu": _cpu_unfit,
    "triton": _triton_unfit,
    "reference": lambda device, dtype: "",
}
OPERATORS = {
    "dropout": {"cpu": "ops._cpu", "triton": "kernels.dropout", "reference": "ops.reference"},
    "lora_shrink": {"cpu": "ops._cpu", "reference": "ops.reference"},
    "lora_expand_": {"cpu": "ops._cpu", "reference": "ops.reference"},
    "lora_grad_sb": {"cpu": "ops._cpu", "reference": "ops.reference"},
    "lora_grad_ax_": {"cpu": "ops._cpu", "reference": "ops.reference"},
    "ewc_penalty_": {"cpu": "ops._cpu", "reference": "ops.reference"},
    "ewc_accumulate_": {"cpu": "ops._cpu", "reference": "ops.reference"},
    "softmax_cross_entropy_": {"cpu": "ops._cpu", "reference": "ops.reference"},
}


def serve(operator: str, tensor: Tensor) -> Callable[..., Any]:
    """The function that computes ``operator`` on tensors of this one's device and dtype."""
    return _choose(operator, tensor.device.type, tensor.dtype, os.environ.get(VARIABLE))


def explain(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Served]:
    """Who serves each operator on tensors of this device type and dtype, and why every other backend does not."""
    forced = _forced(os.environ.get(VARIABLE))
    rows = []
    for operator in OPERATORS:
        why_not = {name: _why_not(operator, name, device, dtype) for name in BACKENDS}
        fit = [name for name in ([forced] if forced else BACKENDS) if not why_not[name]]
        chosen = fit[0] if fit else None
        for name in BACKENDS:
            if name != chosen and not why_not[name]:
                why_not[name] = f"{VARIABLE}={forced} forces another" if forced else f"{chosen} comes first"
        rows.append(Served(operator, chosen, {name: why for name, why in why_not.items() if name != chosen}))
    return rows


@functools.cache
def _choose(operator: str, device: str, dtype: torch.dtype, variable: str | None) -> Callable[..., Any]:
    forced = _forced(variable)
    for name in [forced] if forced else BACKENDS:
        why_not = _why_not(operator, name, device, dtype)
        if not why_not:
            module = importlib.import_module(f"llmbuilder.{OPERATORS[operator][name]}")
            return getattr(module, operator)
        if forced:
            raise LLMBuilderError(f"{operator}: {VARIABLE}={forced} can't serve it: {why_not}; unset {VARIABLE}")
    raise AssertionError("the reference serves everything")


def _forced(variable: str | None) -> str | None:
    if variable and variable not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise LLMBuilderError(f"{VARIABLE}={variable} names no backend, only {known} do{nearest(variable, BACKENDS)}")
    return variable or None


def _why_not(operator: str, backend: str, device: str, dtype: torch.dtype) -> str:
    if why := BACKENDS[backend](device, dtype):
        return why
    return "" if backend in OPERATORS[operator] else f"it has no {operator}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
