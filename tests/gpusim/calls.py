"""A call of every launcher in every variant that it has, small, without torch: for sanitizers and for the recording
runtime, where torch has no place.

    for call in calls(module, Memory()):
        call.launch(device=0, stream=0)

Matrices come aligned and as slices that are not, ranks for every tile, with and without a mask, in every dtype.
"""

import ctypes
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

SIZES = {"f32": 4, "bf16": 2, "f16": 2}
Matrix = tuple[int, int, int, int]  # address, rows, columns, elements from row to row


class Memory:
    """Blocks of the C heap, each as long as what is in it: beyond it begins what a sanitizer watches.

    ``register(name, address, rows, row_bytes, stride)``: called with the address and the size of each.
    """

    def __init__(self, register: Callable[[bytes, int, int, int, int], Any] = lambda *_: None):
        self._random = random.Random(0)
        self._register = register
        self._blocks: list[Any] = []
        self._tables: list[Any] = []

    def block(self, size: int) -> int:
        """``size`` bytes for a kernel to write: NaN to all types of floats."""
        return self._filled(b"\xff" * size)

    def integers(self, values: list[int]) -> int:
        return self._filled(struct.pack(f"{len(values)}q", *values))

    def floats(self, dtype: str, count: int) -> int:
        return self._filled(b"".join(_bits(dtype, self._random.gauss(0, 1)) for _ in range(count)))

    def _filled(self, data: bytes) -> int:
        return self._kept(self._blocks, data)

    def _kept(self, blocks: list[Any], data: bytes) -> int:
        block = ctypes.create_string_buffer(data, len(data))
        blocks.append(block)
        address = ctypes.addressof(block)
        self._register(f"block of {len(data)} bytes".encode(), address, 1, len(data), len(data))
        return address

    def table(self, size: int) -> int:
        """Memory for the host to fill and kernels to read."""
        return self._kept(self._tables, bytes(size))

    def contents(self) -> list[bytes]:
        """What is in all blocks now."""
        return [block.raw for block in self._blocks]


def _bits(dtype: str, value: float) -> bytes:
    if dtype == "f16":
        return struct.pack("e", value)
    return struct.pack("f", value)[4 - SIZES[dtype] :]


@dataclass
class Call:
    """A launcher with all its arguments, by name and in order, but where to run."""

    name: str
    launcher: Callable[..., None]
    arguments: dict[str, Any]

    def launch(self, device: int, stream: int, **changes: Any) -> None:
        """With these arguments changed."""
        self.launcher(*(self.arguments | changes).values(), device, stream)


@dataclass(frozen=True)
class Case:
    dtype: str
    M: int
    N: int
    K: int
    r: int
    slice: bool = False  # of something wider, which begins in its second column
    threshold: int = 0
    tf32: bool = False

    def __str__(self) -> str:
        marks = ["slice"] * self.slice + ["mask"] * bool(self.threshold) + ["tf32"] * self.tf32
        return "-".join([self.dtype, f"{self.M}x{self.N}x{self.K}", f"r{self.r}", *marks])


LORA_CASES = [
    Case("bf16", 33, 40, 64, 4, threshold=16384),
    Case("bf16", 17, 72, 63, 20, slice=True, threshold=8192),
    Case("bf16", 70, 24, 136, 40),
    Case("f16", 40, 33, 70, 8, slice=True),
    Case("f16", 18, 48, 40, 130, threshold=6554),
    Case("f32", 20, 24, 40, 6, threshold=16384),
    Case("f32", 19, 17, 33, 3, slice=True, threshold=6554),
    Case("f32", 34, 40, 36, 16, tf32=True),
    Case("f32", 18, 33, 35, 9, slice=True, tf32=True),
    Case("bf16", 1, 8, 8, 256),
    Case("bf16", 140, 136, 136, 5, threshold=32768),  # several blocks of every kernel
    Case("f16", 9, 12, 2100, 8),
]


def calls(module: ModuleType, memory: Memory) -> Iterator[Call]:
    """All of them, in an order that never changes."""
    for case in LORA_CASES:
        yield from _lora_calls(module, memory, case)
    for dtype in SIZES:
        yield from _dropout_calls(module, memory, dtype)
        yield from _ewc_calls(module, memory, dtype)
        yield from _cross_entropy_calls(module, memory, dtype)


def _matrix(memory: Memory, case: Case, rows: int, columns: int, output: bool = False) -> Matrix:
    size, margin = SIZES[case.dtype], 1 if case.slice else 0
    stride = columns + 2 * margin
    count = rows * stride
    address = memory.block(count * size) if output else memory.floats(case.dtype, count)
    return address + margin * size, rows, columns, stride


def _workspace(memory: Memory, size: int) -> int:
    return memory.block(size) if size else 0


def _lora_calls(module: ModuleType, memory: Memory, case: Case) -> Iterator[Call]:
    M, N, K, r, tf32 = case.M, case.N, case.K, case.r, case.tf32
    dtype = getattr(module.DType, case.dtype)
    x, W, A, B = (_matrix(memory, case, *shape) for shape in ((M, K), (N, K), (r, K), (N, r)))
    S, dS, dY = (_matrix(memory, case, *shape) for shape in ((M, r), (M, r), (M, N)))
    bias = memory.floats(case.dtype, N)
    mask = (memory.integers([0x123456789ABCDEF]), 3, case.threshold)

    def output(*shape: int) -> Matrix:
        return _matrix(memory, case, *shape, output=True)

    def call(launcher: str, **arguments: Any) -> Call:
        return Call(f"{launcher}-{case}", getattr(module, launcher), {"dtype": dtype, **arguments})

    space = _workspace(memory, module.lora_shrink_workspace(dtype, M, K, r))
    yield call("lora_shrink", x=x, A=A, S=output(M, r), mask=mask, tf32=tf32, workspace=space)

    for add, into, bias_or_none in ((False, output(M, N), bias), (True, dY, 0)):
        yield call("lora_expand", S=S, B=B, bias=bias_or_none, scaling=0.5, accumulate=add, y=into, tf32=tf32)

    space = _workspace(memory, module.lora_grad_sb_workspace(dtype, M, N, r))
    results = {"dS": output(M, r), "dB": memory.block(4 * N * r)}
    yield call("lora_grad_sb", dY=dY, S=S, B=B, scaling=0.5, **results, tf32=tf32, workspace=space)

    space = _workspace(memory, module.lora_grad_ax_workspace(dtype, M, K, r))
    for dX in (output(M, K), (0, M, K, K)):
        results = {"dA": memory.block(4 * r * K), "dX": dX}
        yield call("lora_grad_ax", x=x, dS=dS, A=A, mask=mask, **results, tf32=tf32, workspace=space)

    yield call("lora_fused", x=x, W=W, bias=bias, S=S, B=B, scaling=0.5, y=output(M, N), tf32=tf32)
    yield call("lora_fused_grad", dY=dY, W=W, dS=dS, A=A, mask=mask, dX=output(M, K), tf32=tf32)


def _dropout_calls(module: ModuleType, memory: Memory, name: str) -> Iterator[Call]:
    dtype, mask = getattr(module.DType, name), (memory.integers([-2]), 1, 6554)
    for rows, columns in ((5, 64), (67, 13)):
        x, y = memory.floats(name, rows * columns), memory.block(SIZES[name] * rows * columns)
        arguments = {"dtype": dtype, "x": x, "y": y, "rows": rows, "columns": columns, "mask": mask}
        yield Call(f"dropout-{name}-{rows}x{columns}", module.dropout, arguments)
    arguments = {"keep": memory.block(5 * 19), "rows": 5, "columns": 19, "mask": mask}
    yield Call(f"dropout_mask-{name}", module.dropout_mask, arguments)


def _ewc_calls(module: ModuleType, memory: Memory, name: str) -> Iterator[Call]:
    sizes = [3, 100, 1, 20000, 64]
    params, anchors, fishers, grads = ([memory.floats(name, size) for size in sizes] for _ in range(4))
    for weighted in (True, False):
        groups = params, anchors, fishers if weighted else [], grads
        yield ewc_penalty(module, memory, name, groups, sizes)
    arguments = {"dtype": getattr(module.DType, name), **_ewc_table(module, memory, ([], [], fishers, grads), sizes)}
    yield Call(f"ewc_accumulate-{name}", module.ewc_accumulate, {**arguments, "weight": 0.5})


def ewc_penalty(module: ModuleType, memory: Memory, name: str, groups: Any, sizes: list[int]) -> Call:
    """Of params, anchors, Fisher values or none, and gradients, as addresses."""
    table, weighted = _ewc_table(module, memory, groups, sizes), bool(groups[2])
    arguments = {"dtype": getattr(module.DType, name), **table, "weighted": weighted, "strength": 2.0}
    arguments["value"] = memory.block(8)
    arguments["workspace"] = _workspace(memory, module.ewc_penalty_workspace(table["chunks"]))
    return Call(f"ewc_penalty-{name}-{weighted}", module.ewc_penalty, arguments)


def _ewc_table(module: ModuleType, memory: Memory, groups: Any, sizes: list[int]) -> dict[str, int]:
    table = memory.table(module.ewc_table_bytes(len(sizes)))
    return {"table": table, "count": len(sizes), "chunks": module.ewc_table(table, *groups, sizes)}


def _cross_entropy_calls(module: ModuleType, memory: Memory, name: str) -> Iterator[Call]:
    dtype = getattr(module.DType, name)
    for columns, margin, softcap, weighted in ((640, 0, 0.0, True), (77, 1, 30.0, False)):
        case = Case(name, 3, 0, 0, 0, slice=bool(margin))
        logits, targets = _matrix(memory, case, 3, columns), memory.integers([0, columns - 1, 5])
        weights = memory.floats("f32", 3) if weighted else 0
        for need_grad in (False, True):
            arguments = {"dtype": dtype, "logits": logits, "targets": targets, "row_weights": weights}
            arguments |= {"softcap": softcap, "need_grad": need_grad}
            arguments |= {"losses": memory.block(4 * 3), "predictions": memory.block(8 * 3)}
            yield Call(f"softmax_cross_entropy-{name}-{columns}", module.softmax_cross_entropy, arguments)
