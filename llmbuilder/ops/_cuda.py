"""The backend `cuda`: the kernels of csrc/cuda as functions on a GPU's tensors.

They are the backend operators of docs/design.md. Results and workspaces come from torch's allocator, work goes to
torch's current stream, and nothing waits for it: a call can be captured in a CUDA graph. Nothing is checked twice, but
what a launcher refuses becomes a ValueError, and what the CUDA runtime reports a RuntimeError.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._gpu import Addresses, Sizes, Tables, allows_tf32
from . import _native

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}

_kernels: Any = _native.cuda()  # `_C.cuda`, or None where it is not built
_emulated = False


def available() -> bool:
    """Whether the kernels are there."""
    return _kernels is not None


def why_not() -> str:
    """Why the kernels are not there; empty when they are."""
    return "" if available() else _native.cuda_why_not()


def device_type() -> str:
    """Where the tensors lie that these kernels take."""
    return "cpu" if _emulated else "cuda"


def unfit_driver() -> str:
    """What is wrong with the NVIDIA driver; empty when nothing is."""
    if _emulated:
        return ""
    driver, runtime = _kernels.driver_version(), _kernels.runtime_version()
    if not driver:
        return "no NVIDIA driver is loaded"
    if driver // 1000 < runtime // 1000:
        return f"{versions()}: it needs a newer one (CUDA 13 needs 580 or later)"
    return ""


def unfit_code(device: torch.device) -> str:
    """Why a GPU finds no code here that its driver can run; empty when it does.

    An older driver of the same major version runs a GPU's own code, but translates no PTX that is newer than itself.
    """
    if _emulated or _kernels.driver_version() >= _kernels.runtime_version():
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    if not {f"sm_{major}{least}" for least in range(minor + 1)}.isdisjoint(_kernels.code.split(",")):
        return ""
    return (
        f"{versions()}, which translates nothing newer, and there is no code for compute capability {major}.{minor}; "
        f"`LLMBUILDER_CUDA_ARCHITECTURES={major}{minor} pip install .` makes it"
    )


def versions() -> str:
    """What the driver and the runtime that the kernels are linked with say of themselves."""
    if _emulated:
        return "kernels run on the CPU, in the emulator of the tests"
    driver, runtime = _kernels.driver_version(), _kernels.runtime_version()
    speaks = f"the driver speaks CUDA {_version(driver)}" if driver else "no driver answers"
    return f"kernels built with CUDA {_version(runtime)}, {speaks}"


def _version(number: int) -> str:
    """13000 -> "13.0"."""
    return f"{number // 1000}.{number % 1000 // 10}"


@contextmanager
def replaced(module: Any) -> Iterator[None]:
    """For tests: ``module``, the same kernels built for the CPU, serves tensors there."""
    global _kernels, _emulated
    before = _kernels, _emulated
    _kernels, _emulated = module, True
    try:
        yield
    finally:
        _kernels, _emulated = before


def dropout(x: Tensor, threshold: int, seed: Tensor, stream: int) -> Tensor:
    """``x * keep * 65536 / (65536 - threshold)``; x of any shape, contiguous."""
    y = torch.empty_like(x)
    _kernels.dropout(_dtype(x), x.data_ptr(), y.data_ptr(), *_extent(x.shape), _mask(seed, stream, threshold), *_at(x))
    return y


def dropout_mask(shape: Sequence[int], threshold: int, seed: Tensor, stream: int) -> Tensor:
    """The mask as a boolean tensor on the seed's device, true where an element is kept."""
    keep = torch.empty(tuple(shape), dtype=torch.bool, device=seed.device)
    _kernels.dropout_mask(keep.data_ptr(), *_extent(shape), _mask(seed, stream, threshold), *_at(keep))
    return keep


def lora_shrink(x: Tensor, A: Tensor, threshold: int, seed: Tensor, stream: int) -> Tensor:
    """``S[M, r] = drop(x[M, K]) A[r, K]^T`` in x's dtype."""
    (M, K), r = x.shape, len(A)
    S, workspace = x.new_empty(M, r), _workspace(x, _kernels.lora_shrink_workspace(_dtype(x), M, K, r))
    mask = _mask(seed, stream, threshold)
    _kernels.lora_shrink(
        _dtype(x), _matrix(x), _matrix(A), _matrix(S), mask, allows_tf32(), workspace.data_ptr(), *_at(x)
    )
    return S


def lora_expand(S: Tensor, B: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """``y[M, N] = scaling * S[M, r] B[N, r]^T + bias[N]`` in S's dtype."""
    y = S.new_empty(len(S), len(B))
    arguments = _matrix(S), _matrix(B), _address(bias), scaling, False, _matrix(y)
    _kernels.lora_expand(_dtype(S), *arguments, allows_tf32(), *_at(S))
    return y


def lora_grad_sb(dY: Tensor, S: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """``dS[M, r] = scaling * dY[M, N] B[N, r]`` in dY's dtype and ``dB[N, r] = scaling * dY^T S`` in float32."""
    (M, N), r = dY.shape, B.shape[1]
    dS, dB = dY.new_empty(M, r), dY.new_empty(N, r, dtype=torch.float32)
    workspace = _workspace(dY, _kernels.lora_grad_sb_workspace(_dtype(dY), M, N, r))
    arguments = _matrix(dY), _matrix(S), _matrix(B), scaling, _matrix(dS), dB.data_ptr()
    _kernels.lora_grad_sb(_dtype(dY), *arguments, allows_tf32(), workspace.data_ptr(), *_at(dY))
    return dS, dB


def lora_grad_ax(
    x: Tensor, dS: Tensor, A: Tensor, threshold: int, seed: Tensor, stream: int, need_x: bool
) -> tuple[Tensor, Tensor | None]:
    """``dA[r, K] = dS^T drop(x)`` in float32 and, where x needs it, ``dX[M, K] = drop'(dS A)`` in x's dtype."""
    (M, K), r = x.shape, len(A)
    dA, dX = x.new_empty(r, K, dtype=torch.float32), x.new_empty(M, K) if need_x else None
    workspace = _workspace(x, _kernels.lora_grad_ax_workspace(_dtype(x), M, K, r))
    arguments = _matrix(x), _matrix(dS), _matrix(A), _mask(seed, stream, threshold), dA.data_ptr()
    nowhere = 0, M, K, K
    _kernels.lora_grad_ax(
        _dtype(x), *arguments, nowhere if dX is None else _matrix(dX), allows_tf32(), workspace.data_ptr(), *_at(x)
    )
    return dA, dX


def lora_fused(x: Tensor, W: Tensor, bias: Tensor | None, S: Tensor, B: Tensor, scaling: float) -> Tensor:
    """``y[M, N] = x[M, K] W[N, K]^T + bias[N] + scaling * S[M, r] B[N, r]^T`` in x's dtype, in one kernel."""
    y, W = x.new_empty(len(x), len(W)), W if W.stride(1) == 1 else W.contiguous()
    arguments = _matrix(x), _matrix(W), _address(bias), _matrix(S), _matrix(B), scaling, _matrix(y)
    _kernels.lora_fused(_dtype(x), *arguments, allows_tf32(), *_at(x))
    return y


def lora_fused_grad(dY: Tensor, W: Tensor, dS: Tensor, A: Tensor, threshold: int, seed: Tensor, stream: int) -> Tensor:
    """``dX[M, K] = dY[M, N] W[N, K] + drop'(dS[M, r] A[r, K])`` in dY's dtype, in one kernel."""
    dX, W = dY.new_empty(len(dY), W.shape[1]), W if W.stride(1) == 1 else W.contiguous()
    arguments = _matrix(dY), _matrix(W), _matrix(dS), _matrix(A), _mask(seed, stream, threshold), _matrix(dX)
    _kernels.lora_fused_grad(_dtype(dY), *arguments, allows_tf32(), *_at(dY))
    return dX


def ewc_penalty_(
    params: Sequence[Tensor], anchors: Sequence[Tensor], fishers: Sequence[Tensor] | None, strength: float
) -> Tensor:
    """``strength/2 * sum F (theta - anchor)^2``, fp64; adds ``strength * F * (theta - anchor)`` to every ``.grad``.

    All of one dtype, and every parameter has a gradient; ``fishers=None`` stands for ones.
    """
    first, grads = params[0], [param.grad for param in params if param.grad is not None]
    value = first.new_empty((), dtype=torch.float64)
    table = _tables.of(params, anchors, fishers or (), grads)
    workspace = _workspace(first, _kernels.ewc_penalty_workspace(table.chunks))
    arguments = table.memory.data_ptr(), len(params), table.chunks, fishers is not None, strength
    _kernels.ewc_penalty(_dtype(first), *arguments, value.data_ptr(), workspace.data_ptr(), *_at(first))
    return value


def ewc_accumulate_(fishers: Sequence[Tensor], grads: Sequence[Tensor], weight: float) -> None:
    """``F += weight * g**2`` in place; all of one dtype."""
    if not fishers:
        return
    first = fishers[0]
    table = _tables.of((), (), fishers, grads)
    _kernels.ewc_accumulate(_dtype(first), table.memory.data_ptr(), len(fishers), table.chunks, weight, *_at(first))


def softmax_cross_entropy_(
    logits: Tensor, targets: Tensor, row_weights: Tensor | None, softcap: float, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Losses and predictions of ``logits[M, V]``; their gradient takes the logits' place when asked for."""
    rows = len(logits)
    losses, predictions = (logits.new_empty(rows, dtype=dtype) for dtype in (torch.float32, torch.int64))
    _kernels.softmax_cross_entropy(
        _dtype(logits),
        _matrix(logits),
        targets.data_ptr(),
        _address(row_weights),
        softcap,
        need_grad,
        losses.data_ptr(),
        predictions.data_ptr(),
        *_at(logits),
    )
    return losses, predictions


class _Table(NamedTuple):
    """Where the tensors of an EWC call lie, in the GPU's memory."""

    memory: Tensor
    chunks: int


def _written_table(first: Tensor, sizes: Sizes, addresses: Addresses) -> _Table:
    size = _kernels.ewc_table_bytes(len(sizes))
    host = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=first.is_cuda)
    chunks = _kernels.ewc_table(host.data_ptr(), *addresses, sizes)
    return _Table(host.to(first.device, non_blocking=True), chunks)


_tables = Tables(_written_table)


def _dtype(tensor: Tensor) -> Any:
    return getattr(_kernels.DType, DTYPES[tensor.dtype])


def _extent(shape: Sequence[int]) -> tuple[int, int]:
    """Rows over all the leading dimensions, columns in the last."""
    *leading, columns = shape if len(shape) else (1,)
    return torch.Size(leading).numel(), columns


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _matrix(tensor: Tensor) -> tuple[int, int, int, int]:
    """Memory, rows, columns, and elements from one row to the next; columns lie side by side."""
    rows, columns = tensor.shape
    return tensor.data_ptr(), rows, columns, tensor.stride(0) if rows > 1 else columns


def _mask(seed: Tensor, stream: int, threshold: int) -> tuple[int, int, int]:
    return seed.data_ptr(), stream, threshold


def _workspace(tensor: Tensor, size: int) -> Tensor:
    """So many bytes beside the tensor."""
    return torch.empty(size, dtype=torch.uint8, device=tensor.device)


def _at(tensor: Tensor) -> tuple[int, int]:
    """The tensor's GPU and torch's stream there."""
    if _emulated:
        return 0, 0
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream
