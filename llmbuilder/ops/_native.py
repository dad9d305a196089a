"""The only importer of the compiled extension ``_C``: its kernels as functions on CPU tensors.

They are the backend operators of docs/design.md. Nothing is checked here: matrices are contiguous, of one dtype and on
the CPU, which ``llmbuilder.ops`` has seen to.
"""

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch  # before _C, so that both use torch's OpenMP runtime and its one pool of threads
from torch import Tensor

from ..errors import LLMBuilderError

if TYPE_CHECKING:
    from .. import _C


def _load() -> str:
    """Import ``_C`` into this module; the reason, when it cannot be."""
    global _C
    try:
        _C = importlib.import_module("llmbuilder._C")
    except ModuleNotFoundError:
        return (
            "the extension llmbuilder._C is not built: type `pip install .` in the source tree (or `make test`, which "
            "also makes an environment); it needs GCC or Clang"
        )
    except ImportError as error:
        return f"the extension llmbuilder._C does not load ({error}): build it again with `pip install .`"
    try:
        _C.isa()
    except ValueError as error:  # a forced instruction set that does not fit is an error, never a quiet fall-back
        raise LLMBuilderError(f"{error}; unset LLMBUILDER_ISA to use the best one") from error
    return ""


_WHY_NOT = _load()
_DTYPES = {} if _WHY_NOT else {torch.float32: _C.DType.f32, torch.bfloat16: _C.DType.bf16, torch.float16: _C.DType.f16}


def available() -> bool:
    """Whether the extension is there."""
    return not _WHY_NOT


def why_not() -> str:
    """Why the extension is not there, and what to type; empty when it is."""
    return _WHY_NOT


def cuda() -> Any:
    """The extension's CUDA launchers, or None where it was built without them; `_cuda` makes operators of them."""
    return None if _WHY_NOT else getattr(_C, "cuda", None)


def cuda_why_not() -> str:
    """Why there are no CUDA launchers; empty when there are."""
    return _WHY_NOT or (_C.cuda_why_not and f"{_C.cuda_why_not}; `LLMBUILDER_CUDA=ON pip install .` insists on them")


def serves(dtype: torch.dtype) -> bool:
    """Whether the kernels know this dtype: float32, bfloat16, float16."""
    return dtype in _DTYPES


def isa() -> str:
    """The instruction set in use: avx512_bf16, avx512, avx2 or plain."""
    return _C.isa()


def isas() -> list[str]:
    """The instruction sets that this build has and this processor can run, best first."""
    return _C.isas()


def set_isa(name: str) -> None:
    """Use another instruction set from now on, in the whole process: for tests. ValueError when it does not fit."""
    _C.set_isa(name)


def _rows_columns(shape: Sequence[int]) -> tuple[int, int]:
    """Columns in the last dimension, rows over all the leading ones."""
    *leading, columns = shape if len(shape) else (1,)
    return torch.Size(leading).numel(), columns


def dropout(x: Tensor, threshold: int, seed: Tensor, stream: int) -> Tensor:
    """``x * keep * 65536 / (65536 - threshold)``; x of any shape, contiguous."""
    y = torch.empty_like(x)
    rows, columns = _rows_columns(x.shape)
    _C.dropout(
        _DTYPES[x.dtype], x.data_ptr(), y.data_ptr(), rows, columns, seed.data_ptr(), stream, threshold, _threads()
    )
    return y


def dropout_mask(shape: Sequence[int], threshold: int, seed: Tensor, stream: int) -> Tensor:
    """The mask as a boolean tensor, true where an element is kept."""
    keep = torch.empty(tuple(shape), dtype=torch.bool, device=seed.device)
    rows, columns = _rows_columns(shape)
    _C.dropout_mask(keep.data_ptr(), rows, columns, seed.data_ptr(), stream, threshold, _threads())
    return keep


def lora_shrink(x: Tensor, A: Tensor, threshold: int, seed: Tensor, stream: int) -> Tensor:
    """``S[M, r] = drop(x[M, K]) A[r, K]^T`` in x's dtype."""
    (M, K), r = x.shape, A.shape[0]
    S = x.new_empty(M, r)
    _C.lora_shrink(
        _DTYPES[x.dtype],
        x.data_ptr(),
        A.data_ptr(),
        S.data_ptr(),
        M,
        K,
        r,
        seed.data_ptr(),
        stream,
        threshold,
        _threads(),
    )
    return S


def lora_expand_(y: Tensor, S: Tensor, B: Tensor, scaling: float) -> None:
    """``y[M, N] += scaling * S[M, r] B[N, r]^T`` in place."""
    M, N = y.shape
    _C.lora_expand(_DTYPES[y.dtype], y.data_ptr(), S.data_ptr(), B.data_ptr(), M, N, B.shape[1], scaling, _threads())


def lora_grad_sb(dY: Tensor, S: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """``dS[M, r] = scaling * dY[M, N] B[N, r]`` in dY's dtype and ``dB[N, r] = scaling * dY^T S`` in float32."""
    (M, N), r = dY.shape, B.shape[1]
    dS, dB = torch.empty_like(S), dY.new_empty(N, r, dtype=torch.float32)
    _C.lora_grad_sb(
        _DTYPES[dY.dtype],
        dY.data_ptr(),
        S.data_ptr(),
        B.data_ptr(),
        dS.data_ptr(),
        dB.data_ptr(),
        M,
        N,
        r,
        scaling,
        _threads(),
    )
    return dS, dB


def lora_grad_ax_(
    x: Tensor, dS: Tensor, A: Tensor, threshold: int, seed: Tensor, stream: int, dX: Tensor | None
) -> Tensor:
    """``dA[r, K] = dS^T drop(x)`` in float32 and, unless dX is None, ``dX[M, K] += drop'(dS A)`` in place."""
    (M, K), r = x.shape, A.shape[0]
    dA = x.new_empty(r, K, dtype=torch.float32)
    _C.lora_grad_ax(
        _DTYPES[x.dtype],
        x.data_ptr(),
        dS.data_ptr(),
        A.data_ptr(),
        dA.data_ptr(),
        0 if dX is None else dX.data_ptr(),
        M,
        K,
        r,
        seed.data_ptr(),
        stream,
        threshold,
        _threads(),
    )
    return dA


def ewc_penalty_(
    params: Sequence[Tensor], anchors: Sequence[Tensor], fishers: Sequence[Tensor] | None, strength: float
) -> float:
    """``strength/2 * sum F (theta - anchor)^2``; adds ``strength * F * (theta - anchor)`` to every ``.grad``.

    All of one dtype, and every parameter has a gradient; ``fishers=None`` stands for ones.
    """
    if not params:
        return 0.0
    return _C.ewc_penalty(
        _DTYPES[params[0].dtype],
        _addresses(params),
        _addresses(anchors),
        _addresses(fishers or ()),
        _addresses([param.grad for param in params if param.grad is not None]),
        [param.numel() for param in params],
        strength,
        _threads(),
    )


def ewc_accumulate_(fishers: Sequence[Tensor], grads: Sequence[Tensor], weight: float) -> None:
    """``F += weight * g**2`` in place; all of one dtype."""
    if not fishers:
        return
    _C.ewc_accumulate(
        _DTYPES[fishers[0].dtype],
        _addresses(fishers),
        _addresses(grads),
        [fisher.numel() for fisher in fishers],
        weight,
        _threads(),
    )


def softmax_cross_entropy_(
    logits: Tensor, targets: Tensor, row_weights: Tensor | None, softcap: float, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Losses and predictions of ``logits[M, V]``; their gradient takes the logits' place when asked for."""
    rows, columns = logits.shape
    losses, predictions = (logits.new_empty(rows, dtype=dtype) for dtype in (torch.float32, torch.int64))
    _C.softmax_cross_entropy(
        _DTYPES[logits.dtype],
        logits.data_ptr(),
        rows,
        columns,
        targets.data_ptr(),
        0 if row_weights is None else row_weights.data_ptr(),
        softcap,
        need_grad,
        losses.data_ptr(),
        predictions.data_ptr(),
        _threads(),
    )
    return losses, predictions


def _threads() -> int:
    return torch.get_num_threads()


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
