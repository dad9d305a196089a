"""What this machine offers, who computes each operator on it and why nobody faster does, and whether it is right.

Each operator runs on small random inputs, in every dtype that has kernels, against the reference in fp64. It is right
when its largest error is at most twice that of plain torch in the same dtype, plus one unit in the last place of the
largest value.
"""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._version import __version__
from .ops import _backend, _cuda, _native, _paths, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOT_SEEN = (
    "a GPU. The CUDA kernels have run in an emulator, the Triton kernels in Triton's interpreter; all are compiled and"
    " their code is inspected (Triton's for Hopper and Blackwell only that). None has run on a GPU yet."
)
Operator = Callable[..., Any]


class Inputs:
    """Random tensors of one dtype that hold the same values when asked for again in fp64."""

    def __init__(self, dtype: torch.dtype, device: str, wide: bool) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.dtype = dtype
        self.device = device
        self.wide = wide

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values, rounded to the dtype."""
        values = torch.randn(shape, generator=self.generator).to(self.device, self.dtype)
        return values.double() if self.wide else values

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 in [0, high)."""
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def seed(self) -> Tensor:
        """A dropout seed."""
        return torch.tensor(7, device=self.device)


# Odd sizes, so that every kernel's edges are seen. M rows, K inputs, N outputs, rank R, V words.
M, K, N, R, V = 33, 70, 45, 5, 101
THRESHOLD = 6554  # p = 0.1


def _dropout(operator: Operator, inputs: Inputs) -> list[Tensor]:
    return [operator(inputs.normal(M, K), THRESHOLD, inputs.seed(), 1)]


def _lora_shrink(operator: Operator, inputs: Inputs) -> list[Tensor]:
    return [operator(inputs.normal(M, K), inputs.normal(R, K), THRESHOLD, inputs.seed(), 1)]


def _lora_expand(operator: Operator, inputs: Inputs) -> list[Tensor]:
    return [operator(inputs.normal(M, R), inputs.normal(N, R), inputs.normal(N), 2.0)]


def _lora_expand_(operator: Operator, inputs: Inputs) -> list[Tensor]:
    y = inputs.normal(M, N)
    operator(y, inputs.normal(M, R), inputs.normal(N, R), 2.0)
    return [y]


def _lora_grad_sb(operator: Operator, inputs: Inputs) -> list[Tensor]:
    return list(operator(inputs.normal(M, N), inputs.normal(M, R), inputs.normal(N, R), 2.0))


def _lora_grad_ax(operator: Operator, inputs: Inputs) -> list[Tensor]:
    arguments = inputs.normal(M, K), inputs.normal(M, R), inputs.normal(R, K)
    return list(operator(*arguments, THRESHOLD, inputs.seed(), 1, True))


def _lora_fused(operator: Operator, inputs: Inputs) -> list[Tensor]:
    base = inputs.normal(M, K), inputs.normal(N, K), inputs.normal(N)
    return [operator(*base, inputs.normal(M, R), inputs.normal(N, R), 2.0)]


def _lora_grad_ax_(operator: Operator, inputs: Inputs) -> list[Tensor]:
    dX = inputs.normal(M, K)
    arguments = inputs.normal(M, K), inputs.normal(M, R), inputs.normal(R, K)
    return [operator(*arguments, THRESHOLD, inputs.seed(), 1, dX), dX]


def _lora_fused_grad(operator: Operator, inputs: Inputs) -> list[Tensor]:
    base = inputs.normal(M, N), inputs.normal(N, K)
    return [operator(*base, inputs.normal(M, R), inputs.normal(R, K), THRESHOLD, inputs.seed(), 1)]


def _ewc_penalty(operator: Operator, inputs: Inputs) -> list[Tensor]:
    params, anchors, fishers = ([inputs.normal(M, K), inputs.normal(N)] for _ in range(3))
    for param in params:
        param.grad = inputs.normal(*param.shape)
    value = operator(params, anchors, [fisher.square() for fisher in fishers], 0.5)
    return [torch.as_tensor(value, dtype=torch.float64), *[param.grad for param in params if param.grad is not None]]


def _ewc_accumulate(operator: Operator, inputs: Inputs) -> list[Tensor]:
    fishers, grads = ([inputs.normal(M, K), inputs.normal(N)] for _ in range(2))
    operator(fishers, grads, 0.5)
    return fishers


def _softmax_cross_entropy(operator: Operator, inputs: Inputs) -> list[Tensor]:
    logits = inputs.normal(M, V)
    losses, predictions = operator(logits, inputs.integers(V, M), None, 0.0, True)
    return [losses, predictions, logits]


CASES: dict[str, Callable[[Operator, Inputs], list[Tensor]]] = {
    "dropout": _dropout,
    "lora_shrink": _lora_shrink,
    "lora_expand": _lora_expand,
    "lora_expand_": _lora_expand_,
    "lora_grad_sb": _lora_grad_sb,
    "lora_grad_ax": _lora_grad_ax,
    "lora_grad_ax_": _lora_grad_ax_,
    "lora_fused": _lora_fused,
    "lora_fused_grad": _lora_fused_grad,
    "ewc_penalty_": _ewc_penalty,
    "ewc_accumulate_": _ewc_accumulate,
    "softmax_cross_entropy_": _softmax_cross_entropy,
}


@dataclass(frozen=True)
class Check:
    """One operator in one dtype: who computes it here, why others do not, and what is wrong with it, if anything."""

    operator: str
    device: str
    dtype: torch.dtype
    backend: str
    why_not: dict[str, str]
    wrong: str


def checks(device: str) -> Iterator[Check]:
    """Run every operator in every dtype on this device type."""
    for dtype in DTYPES:
        for served in _backend.explain(device, dtype):
            wrong = _wrong(served.operator, device, dtype) if served.backend else "no backend can serve it"
            yield Check(served.operator, device, dtype, served.backend or "nobody", served.why_not, wrong)


def _wrong(operator: str, device: str, dtype: torch.dtype) -> str:
    """How the operator's result breaks the error rule; empty when it does not."""
    case, plain = CASES[operator], getattr(reference, operator)
    try:
        found = case(_backend.serve(operator, torch.empty(0, device=device, dtype=dtype)), Inputs(dtype, device, False))
    except Exception as error:  # a broken kernel must not hide the report on the others
        return f"{type(error).__name__}: {error}"
    same = case(plain, Inputs(dtype, device, wide=False))
    exact = case(plain, Inputs(dtype, device, wide=True))
    for number, (out, torchs, ref) in enumerate(zip(found, same, exact, strict=True)):
        distance, bound = _distance(out, ref), 2 * _distance(torchs, ref) + _ulp(ref, dtype)
        if not distance <= bound:  # so that NaN is wrong
            return f"error {distance:.3g} in result {number}, at most {bound:.3g} is right"
    return ""


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _ulp(values: Tensor, dtype: torch.dtype) -> float:
    return float(values.double().abs().max()) * torch.finfo(dtype).eps


def machine() -> dict[str, str]:
    """What there is: versions, processor, threads, GPUs."""
    return {
        "llmbuilder": f"{__version__}, {_native_text()}",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} of {os.cpu_count()} processors, {_openmp()}",
        "processor": f"{_processor()}; torch sees {torch.backends.cpu.get_cpu_capability()}",
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "gpu": _gpu(),
        "cuda": _cuda_text(),
    }


def _native_text() -> str:
    reason = _native.why_not()
    return f"compiled kernels: {reason}" if reason else f"compiled kernels for {_native.isa()}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _openmp() -> str:
    """The OpenMP libraries in this process; two of them mean two pools of threads that get into each other's way."""
    if sys.platform != "linux":
        return "OpenMP pools cannot be counted on this system"
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    pools = sorted(file for file in files if any(name in Path(file).name for name in ("libgomp", "libiomp", "libomp")))
    return f"{len(pools)} OpenMP pool{'s, which slow each other down' if len(pools) > 1 else ''}: {', '.join(pools)}"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "torch sees none"
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{gpu.name} (compute capability {gpu.major}.{gpu.minor})" for gpu in gpus)


def _cuda_text() -> str:
    """The three versions that must fit: the driver's, torch's and that of the compiled kernels."""
    file = Path("/proc/driver/nvidia/version")
    driver = file.read_text().splitlines()[0] if file.exists() else "no NVIDIA driver"
    built = f"torch built with CUDA {torch.version.cuda}" if torch.version.cuda else "torch built without CUDA"
    kernels = _cuda.versions() if _cuda.available() else f"no CUDA kernels: {_cuda.why_not()}"
    return f"{driver}; {built}; {kernels}"


def report() -> tuple[str, bool]:
    """All of it as text, and whether every check passed."""
    lines = [f"{name:<14}{text}" for name, text in machine().items()]
    passed = True
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        by_operator: dict[str, list[Check]] = {}
        for check in checks(device):
            by_operator.setdefault(check.operator, []).append(check)
        lines += ["", f"operators on {device}"]
        for operator, found in by_operator.items():
            lines += _operator_lines(operator, found)
            passed = passed and not any(check.wrong for check in found)
        lines += _reasons([found[0] for found in by_operator.values()])
        if device == "cuda":
            lines.append(f"  lora_fused is checked, and serves {_paths.where()}")
    return "\n".join([*lines, "", f"not seen: {NOT_SEEN}"]), passed


def _operator_lines(operator: str, found: list[Check]) -> Iterator[str]:
    """One line for each backend that serves the operator, then its failures."""
    for backend in dict.fromkeys(check.backend for check in found):
        dtypes = [str(check.dtype).removeprefix("torch.") for check in found if check.backend == backend]
        verdict = "FAILED" if any(check.wrong for check in found if check.backend == backend) else "ok"
        yield f"  {operator:<24}{backend:<12}{verdict:<8}{', '.join(dtypes)}"
    for check in found:
        if check.wrong:
            yield f"    FAILED in {str(check.dtype).removeprefix('torch.')}: {check.wrong}"


def _reasons(found: list[Check]) -> Iterator[str]:
    """Why a backend serves no operator, or not some, each reason once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for check in found:
        for name, reason in check.why_not.items():
            reasons.setdefault((name, reason), []).append(check.operator)
    for (name, reason), operators in reasons.items():
        whom = "" if len(operators) == len(found) else f" (for {', '.join(operators)})"
        yield f"  not {name}: {reason}{whom}"
