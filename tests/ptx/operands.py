"""How an instruction reads and writes its operands.

Each function decodes an operand once and returns what then runs for a warp: a reader ``(warp) -> [32]`` or a writer
``(warp, lanes, value)``. Registers are replaced, never changed in place, since two may share one array.
"""

import re
from collections.abc import Callable

import numpy as np
from ptx.errors import PtxError
from ptx.parse import PARAMETER_BASE, Kernel
from ptx.values import RAW, TYPES, as_bits, as_type, constant, size_of

Reader = Callable[..., np.ndarray]
Writer = Callable[..., None]


def register_raw(kernel: Kernel, name: str) -> type:
    type_ = kernel.registers[name]
    return np.bool_ if type_ == "pred" else RAW[size_of(type_)]


def reader(kernel: Kernel, operand: str, type_: str) -> Reader:
    if operand.startswith("!"):
        inner = reader(kernel, operand[1:], type_)
        return lambda warp: ~inner(warp)
    if operand in kernel.registers:
        if register_raw(kernel, operand) is TYPES[type_]:
            return lambda warp: warp.registers[operand]
        return lambda warp: as_type(warp.registers[operand], type_)
    if operand.startswith("%"):
        wanted = TYPES[type_]
        return lambda warp: warp.special(operand).astype(wanted)
    if operand in kernel.parameters:  # its address
        operand = str(PARAMETER_BASE + kernel.parameters[operand][0])
    value = constant(str(kernel.shared.get(operand, operand)), type_)
    return lambda warp: value


def writer(kernel: Kernel, operand: str) -> Writer:
    if operand == "_":
        return lambda warp, lanes, value: None
    if operand not in kernel.registers:
        raise PtxError(f"no such register: {operand}")
    raw = register_raw(kernel, operand)

    def write(warp, lanes, value):
        bits = as_bits(value, raw)
        if lanes is not warp.everyone:
            bits = np.where(lanes, bits, warp.registers[operand])
        warp.registers[operand] = bits

    return write


def addresses(kernel: Kernel, operand: str) -> Reader:
    """Of "[base+offset]"."""
    found = re.fullmatch(r"\[([\w$%]+)(?:\+(-?\w+))?\]", operand.replace(" ", ""))
    if not found:
        raise PtxError(f"address not understood: {operand}")
    base = reader(kernel, found[1], "u64")
    offset = np.uint64(int(found[2] or "0", 0) & 0xFFFFFFFFFFFFFFFF)
    return (lambda warp: base(warp) + offset) if offset else base


def elements(operand: str) -> list[str]:
    """The parts of "{a, b}"; of anything else itself."""
    return [part.strip() for part in operand[1:-1].split(",")] if operand.startswith("{") else [operand]
