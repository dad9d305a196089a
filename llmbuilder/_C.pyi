# ruff: noqa: N999  (an extension's name)
"""The compiled kernels: addresses and sizes instead of tensors, nothing checked. Use llmbuilder.ops."""

import enum
from types import ModuleType

cuda: ModuleType  # the CUDA launchers, where they are built; _cuda.py is their one caller
cuda_why_not: str

class DType(enum.Enum):
    f32 = 0
    bf16 = 1
    f16 = 2

def isa() -> str: ...
def isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def philox(counters: int, words: int, n: int, key: int) -> None: ...
def dropout(
    dtype: DType, x: int, y: int, rows: int, columns: int, seed: int, stream: int, threshold: int, threads: int
) -> None: ...
def dropout_mask(keep: int, rows: int, columns: int, seed: int, stream: int, threshold: int, threads: int) -> None: ...
def lora_shrink(
    dtype: DType,
    x: int,
    A: int,
    S: int,
    M: int,
    K: int,
    r: int,
    seed: int,
    stream: int,
    threshold: int,
    threads: int,
) -> None: ...
def lora_expand(dtype: DType, y: int, S: int, B: int, M: int, N: int, r: int, scaling: float, threads: int) -> None: ...
def lora_grad_sb(
    dtype: DType,
    dY: int,
    S: int,
    B: int,
    dS: int,
    dB: int,
    M: int,
    N: int,
    r: int,
    scaling: float,
    threads: int,
) -> None: ...
def lora_grad_ax(
    dtype: DType,
    x: int,
    dS: int,
    A: int,
    dA: int,
    dX: int,
    M: int,
    K: int,
    r: int,
    seed: int,
    stream: int,
    threshold: int,
    threads: int,
) -> None: ...
def ewc_penalty(
    dtype: DType,
    params: list[int],
    anchors: list[int],
    fishers: list[int],
    grads: list[int],
    sizes: list[int],
    strength: float,
    threads: int,
) -> float: ...
def ewc_accumulate(
    dtype: DType, fishers: list[int], grads: list[int], sizes: list[int], weight: float, threads: int
) -> None: ...
def softmax_cross_entropy(
    dtype: DType,
    logits: int,
    rows: int,
    columns: int,
    targets: int,
    row_weights: int,
    softcap: float,
    need_grad: bool,
    losses: int,
    predictions: int,
    threads: int,
) -> None: ...
