"""How every kernel is launched, and how those with a choice of tiles are tuned."""

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .._gpu import allows_tf32
from ..errors import LLMBuilderError


def launch(
    kernel: Any, programs: int | Callable[[dict[str, Any]], int], on: Tensor, *arguments: Any, **meta: Any
) -> None:
    """Run so many programs on the device of ``on``; none is no error.

    One axis only: a grid's second and third end at 65,535. Products and sums are fused (one rounding less) whatever
    the environment says, since Triton's own default is about to change.
    """
    if programs == 0:
        return

    def grid(chosen: dict[str, Any]) -> tuple[int]:
        return (programs(chosen) if callable(programs) else programs,)

    with torch.cuda.device_of(on):  # type: ignore[no-untyped-call]
        kernel[grid](*arguments, **meta, enable_fp_fusion=True)


def tuned(
    configs: Sequence[triton.Config],
    key: list[str],
    fits: Callable[[dict[str, Any]], bool],
    restore: list[str] | None = None,
) -> Callable[..., Any]:
    """Triton's autotuner: the fastest of ``configs`` for each value of ``key``, remembered on disk where it can be.

    ``fits`` takes a launch's arguments and constants by name, and says whether it is worth compiling: whether what a
    thread must hold goes into its registers. Configs differ in nothing that changes the order of a sum, so that the
    bits of a result do not depend on the choice. Interpreted, the first config serves. ``restore`` names what the
    kernel changes in place.
    """

    def prune(configs: list[triton.Config], arguments: dict[str, Any], **meta: Any) -> list[triton.Config]:
        _refuse_capture()
        fit = [config for config in configs if fits({**arguments, **meta, **config.all_kwargs()})]
        if not fit:
            raise LLMBuilderError(
                "the Triton kernels hold at most 512 ranks in registers, 256 in fp32, and this adapter's are padded to "
                f"{meta['RANK']}; LLMBUILDER_BACKEND=cuda or reference takes any rank"
            )
        return fit

    known = inspect.signature(triton.autotune).parameters
    remembered = {"cache_results": True} if "cache_results" in known else {}
    return triton.autotune(
        configs=list(configs[:1] if os.environ.get("TRITON_INTERPRET") == "1" else configs),
        key=key,
        prune_configs_by={"early_config_prune": prune},
        restore_value=restore,
        **remembered,
    )


def size_class(rows: int) -> int:
    """Rows to the next power of two: what tuning for a number of rows goes by."""
    return triton.next_power_of_2(max(rows, 1))


def precision(dtype: torch.dtype) -> str:
    """How products are computed: by FMA ("ieee") in fp32, unless torch's own setting for products allows tf32.

    Narrow dtypes have but one way, on tensor cores, and answer "tf32" too.
    """
    return "ieee" if dtype == torch.float32 and not allows_tf32() else "tf32"


def _refuse_capture() -> None:
    """Tuning runs and times kernels, which can't be captured in a graph."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise LLMBuilderError(
            "a Triton kernel meets this shape for the first time inside the capture of a CUDA graph, where it can't be "
            "tuned; run the same step once before the capture"
        )
