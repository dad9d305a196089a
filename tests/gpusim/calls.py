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
        """Memory of the host."""
        return self._kept(self._tables, bytes(size))

    def on_device(self, table: int) -> int:
        """Where kernels find a copy of the table."""
        return table

    def contents(self) -> list[bytes]:
        """What is in all blocks now."""
        return [block.raw for block in self._blocks]


def _bits(dtype: str, value: float) -> bytes:
    if dtype == "f16":
        return struct.pack("e", value)
    return struct.pack("f", value)[4 - SIZES[dtype] :]


@dataclass
class Call:
    """A launcher with all its arguments but where to run."""

    name: str
    launcher: Callable[..., None]
    arguments: tuple[Any, ...]
    launches: int | None = None  # exactly, where that is known

    def launch(self, device: int, stream: int) -> None:
        self.launcher(*self.arguments, device, stream)


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
    M, N, K, r = case.M, case.N, case.K, case.r
    dtype = getattr(module.DType, case.dtype)
    x, W, A, B = (_matrix(memory, case, *shape) for shape in ((M, K), (N, K), (r, K), (N, r)))
    S, dS, dY = (_matrix(memory, case, *shape) for shape in ((M, r), (M, r), (M, N)))
    bias = memory.floats(case.dtype, N)
    mask = (memory.integers([0x123456789ABCDEF]), 3, case.threshold)

    def output(*shape: int) -> Matrix:
        return _matrix(memory, case, *shape, output=True)

    def gradient(count: int) -> int:
        return memory.block(4 * count)

    space = _workspace(memory, module.lora_shrink_workspace(dtype, M, K, r))
    arguments = dtype, x, A, output(M, r), mask, case.tf32, space
    yield Call(f"lora_shrink-{case}", module.lora_shrink, arguments)

    arguments = dtype, S, B, bias, 0.5, False, output(M, N), case.tf32
    yield Call(f"lora_expand-{case}", module.lora_expand, arguments)
    yield Call(f"lora_expand-add-{case}", module.lora_expand, (dtype, S, B, 0, 0.5, True, dY, case.tf32))

    space = _workspace(memory, module.lora_grad_sb_workspace(dtype, M, N, r))
    arguments = dtype, dY, S, B, 0.5, output(M, r), gradient(N * r), case.tf32, space
    yield Call(f"lora_grad_sb-{case}", module.lora_grad_sb, arguments)

    space = _workspace(memory, module.lora_grad_ax_workspace(dtype, M, K, r))
    for name, dX in (("", output(M, K)), ("no_dX-", (0, M, K, K))):
        arguments = dtype, x, dS, A, mask, gradient(r * K), dX, case.tf32, space
        yield Call(f"lora_grad_ax-{name}{case}", module.lora_grad_ax, arguments)

    arguments = dtype, x, W, bias, S, B, 0.5, output(M, N), case.tf32
    yield Call(f"lora_fused-{case}", module.lora_fused, arguments)
    arguments = dtype, dY, W, dS, A, mask, output(M, K), case.tf32
    yield Call(f"lora_fused_grad-{case}", module.lora_fused_grad, arguments)


def _dropout_calls(module: ModuleType, memory: Memory, name: str) -> Iterator[Call]:
    dtype, seed = getattr(module.DType, name), memory.integers([-2])
    for rows, columns in ((5, 64), (67, 13)):
        x, y = memory.floats(name, rows * columns), memory.block(SIZES[name] * rows * columns)
        arguments = dtype, x, y, rows, columns, (seed, 1, 6554)
        yield Call(f"dropout-{name}-{rows}x{columns}", module.dropout, arguments)
    keep = memory.block(5 * 19)
    yield Call(f"dropout_mask-{name}", module.dropout_mask, (keep, 5, 19, (seed, 1, 6554)))


def _ewc_calls(module: ModuleType, memory: Memory, name: str) -> Iterator[Call]:
    dtype, sizes = getattr(module.DType, name), [3, 100, 1, 20000, 64]
    params, anchors, fishers, grads = ([memory.floats(name, size) for size in sizes] for _ in range(4))
    for weighted in (True, False):
        groups = params, anchors, fishers if weighted else [], grads
        table, chunks = _ewc_table(module, memory, groups, sizes)
        value = memory.block(8)
        space = _workspace(memory, module.ewc_penalty_workspace(chunks))
        arguments = dtype, table, len(sizes), chunks, weighted, 2.0, value, space
        yield Call(f"ewc_penalty-{name}-{weighted}", module.ewc_penalty, arguments, launches=2)
    table, chunks = _ewc_table(module, memory, ([], [], fishers, grads), sizes)
    yield Call(f"ewc_accumulate-{name}", module.ewc_accumulate, (dtype, table, len(sizes), chunks, 0.5))


def _ewc_table(module: ModuleType, memory: Memory, groups: Any, sizes: list[int]) -> tuple[int, int]:
    host = memory.table(module.ewc_table_bytes(len(sizes)))
    chunks = module.ewc_table(host, *groups, sizes)
    return memory.on_device(host), chunks


def _cross_entropy_calls(module: ModuleType, memory: Memory, name: str) -> Iterator[Call]:
    dtype = getattr(module.DType, name)
    for columns, margin, softcap, weighted in ((640, 0, 0.0, True), (77, 1, 30.0, False)):
        case = Case(name, 3, 0, 0, 0, slice=bool(margin))
        logits, targets = _matrix(memory, case, 3, columns), memory.integers([0, columns - 1, 5])
        weights = memory.floats("f32", 3) if weighted else 0
        for need_grad in (False, True):
            outputs = memory.block(4 * 3), memory.block(8 * 3)
            arguments = dtype, logits, targets, weights, softcap, need_grad, *outputs
            yield Call(f"softmax_cross_entropy-{name}-{columns}-{need_grad}", module.softmax_cross_entropy, arguments)
