"""Matrices as a kernel has to take them, anywhere in memory, and with guard bands around what it writes."""

import mmap
from collections.abc import Callable

import torch
from torch import Tensor

from .harness import poisoned

# "aligned": a slice whose rows begin at multiples of 16 bytes; "slice" and "offset": they do not
LAYOUTS = ["plain", "aligned", "slice", "offset"]


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another layout, with NaN around them."""
    memory, view = _memory(*x.shape, x.dtype, layout)
    return view(memory).copy_(x)


def guarded(rows: int, columns: int, dtype: torch.dtype, layout: str = "plain") -> tuple[Tensor, Callable[[], None]]:
    """A poisoned matrix for a result, and what asserts afterwards that the memory around it is as it was."""
    memory, view = _memory(rows, columns, dtype, layout)
    around = torch.ones_like(memory, dtype=torch.bool)
    view(around).fill_(False)
    bits = memory.view({2: torch.int16, 4: torch.int32}[dtype.itemsize])

    def check() -> None:
        assert (bits[around] == -1).all(), "the kernel wrote beside its result"

    return view(memory), check


def check_bits(emulator, compute: Callable[..., tuple[Tensor, ...]], operands: tuple[Tensor, ...]) -> None:
    """compute(layout, *operands) has the same bits in every layout, under every schedule, call after call."""
    expected = compute("plain", *operands)
    for schedule in range(8):
        emulator.schedule(schedule)
        layout = LAYOUTS[schedule % len(LAYOUTS)]
        found = compute(layout, *(laid_out(t, layout) for t in operands))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (schedule, layout)


def far_apart(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A poisoned matrix whose last row begins beyond 2**32 elements; between the rows nothing is ever touched."""
    stride = 8 * (2**29 // (rows - 1) + 1)
    reserve_nothing = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    memory = mmap.mmap(-1, rows * stride * dtype.itemsize, flags=reserve_nothing)
    return torch.frombuffer(memory, dtype=dtype).view(rows, stride)[:, :columns].fill_(torch.nan)


def rounded_to_tf32(x: Tensor) -> Tensor:
    """fp32 with a mantissa of ten bits, ties away from zero: what tensor cores make of it."""
    return (x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)


def _memory(rows: int, columns: int, dtype: torch.dtype, layout: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    def flat(first: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        size = rows * columns
        return poisoned(size + 2 * first, dtype=dtype), lambda m: m[first : first + size].view(rows, columns)

    def sliced(first: int, stride: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return poisoned(rows, stride, dtype=dtype), lambda m: m[:, first : first + columns]

    match layout:
        case "plain":
            return flat(8)
        case "offset":
            return flat(1)
        case "aligned":
            return sliced(8, columns + (-columns) % 8 + 16)
        case "slice":
            return sliced(1, columns + 3)
    raise ValueError(f"no layout {layout!r}: {LAYOUTS}")
