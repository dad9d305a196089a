"""Instructions that compute in registers.

``DECODERS[opcode](kernel, instruction)`` returns what then runs for a warp: ``action(warp, lanes)``.
"""

from dataclasses import replace

import numpy as np
from ptx.errors import PtxError
from ptx.operands import elements, reader, register_raw, writer
from ptx.values import RAW, TYPES, as_type, halves, narrowed, numbers, pair, size_of, to_tf32

DECODERS = {}


def decodes(*opcodes):
    def register(decoder):
        DECODERS.update(dict.fromkeys(opcodes, decoder))
        return decoder

    return register


def applying(kernel, instruction, types, function):
    """Destination = function(operands read as ``types``)."""
    put = writer(kernel, instruction.operands[0])
    get = [reader(kernel, operand, type_) for operand, type_ in zip(instruction.operands[1:], types, strict=True)]
    if len(get) == 1:
        (one,) = get
        return lambda warp, lanes: put(warp, lanes, function(one(warp)))
    if len(get) == 2:
        one, two = get
        return lambda warp, lanes: put(warp, lanes, function(one(warp), two(warp)))
    return lambda warp, lanes: put(warp, lanes, function(*(read(warp) for read in get)))


def on_type(function, type_):
    """A function of fp32 made one of 16-bit values, single or packed; of other types itself."""
    if type_ in ("f16", "bf16"):

        def single(*values):
            return narrowed(function(*(numbers(v.view(np.uint16), type_) for v in values)), type_)

        return single
    if type_ in ("f16x2", "bf16x2"):
        single = on_type(function, type_[:-2])

        def packed(*values):
            lows, highs = zip(*(halves(v) for v in values), strict=True)
            return pair(single(*lows), single(*highs))

        return packed
    return function


def _quotient(x, y):
    if x.dtype.kind == "f":
        return x / y
    y = np.where(y == 0, np.ones_like(y), y)
    if x.dtype.kind == "u":
        return x // y
    down = x // y
    return (down + ((down * y != x) & ((x < 0) != (y < 0)))).astype(x.dtype)  # towards zero


def _remainder(x, y):
    return np.fmod(x, np.where(y == 0, np.ones_like(y), y))


TWO = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": _quotient,
    "rem": _remainder,
    "min": np.fmin,
    "max": np.fmax,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "copysign": lambda sign, value: np.copysign(value, sign),
}
ONE = {
    "neg": np.negative,
    "not": np.invert,
    "abs": np.abs,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "tanh": np.tanh,
}


@decodes(*TWO)
def _two(kernel, instruction):
    opcode, type_ = instruction.opcode, instruction.opcode[-1]
    if opcode[0] == "mul" and ("wide" in opcode or "hi" in opcode):
        return _wide(kernel, instruction)
    function = np.multiply if opcode[0] == "mul" else TWO[opcode[0]]
    if "NaN" in opcode:
        function = {"min": np.minimum, "max": np.maximum}[opcode[0]]
    return applying(kernel, instruction, [type_] * 2, on_type(function, type_))


@decodes(*ONE)
def _one(kernel, instruction):
    type_ = instruction.opcode[-1]
    return applying(kernel, instruction, [type_], on_type(ONE[instruction.opcode[0]], type_))


def _wide(kernel, instruction):
    """mul and mad, .wide or .hi: the whole product of two integers, or its high half."""
    opcode, type_ = instruction.opcode, instruction.opcode[-1]
    bits, kind = 8 * size_of(type_), type_[0]
    if bits > 32 and "wide" in opcode:
        raise PtxError(f"not modelled: {instruction.text}")
    double = f"{kind}{2 * bits}"

    def product(x, y):
        if bits == 64:  # the high half through Python's integers
            whole = [int(a) * int(b) >> 64 for a, b in zip(x, y, strict=True)]
            return np.array([w & 0xFFFFFFFFFFFFFFFF for w in whole], np.uint64).view(x.dtype)
        whole = x.astype(TYPES[double]) * y.astype(TYPES[double])
        return whole if "wide" in opcode else (whole >> whole.dtype.type(bits)).astype(x.dtype)

    if opcode[0] == "mul":
        return applying(kernel, instruction, [type_] * 2, product)
    third = double if "wide" in opcode else type_
    return applying(kernel, instruction, [type_, type_, third], lambda x, y, z: product(x, y) + z)


def _fused(x, y, z):
    if x.dtype == np.float32:  # exact product; one rounding but for ties of the second
        return (x.astype(np.float64) * y + z).astype(np.float32)
    return x * y + z


@decodes("fma", "mad")
def _multiply_add(kernel, instruction):
    opcode, type_ = instruction.opcode, instruction.opcode[-1]
    if "wide" in opcode or "hi" in opcode:
        return _wide(kernel, instruction)
    return applying(kernel, instruction, [type_] * 3, on_type(_fused, type_))


@decodes("shl", "shr")
def _shift(kernel, instruction):
    type_ = instruction.opcode[-1]
    bits = 8 * size_of(type_)
    operator = np.left_shift if instruction.opcode[0] == "shl" else np.right_shift

    def shift(x, by):
        moved = operator(x, np.minimum(by, bits - 1).astype(x.dtype))
        return moved if x.dtype.kind == "i" else np.where(by >= bits, x.dtype.type(0), moved)

    return applying(kernel, instruction, [type_, "u32"], shift)


@decodes("shf")
def _funnel(kernel, instruction):
    left, wrap = "l" in instruction.opcode, "wrap" in instruction.opcode

    def funnel(low, high, by):
        by = (by & np.uint32(31) if wrap else np.minimum(by, 32)).astype(np.uint64)
        both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        return ((both << by) >> np.uint64(32) if left else both >> by).astype(np.uint32)

    return applying(kernel, instruction, ["u32"] * 3, funnel)


@decodes("lop3")
def _logic(kernel, instruction):
    table = int(instruction.operands[4], 0)

    def logic(a, b, c):
        result = np.zeros_like(a)
        for case in range(8):
            if table >> case & 1:
                result |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
        return result

    without_table = replace(instruction, operands=instruction.operands[:4])
    return applying(kernel, without_table, ["b32"] * 3, logic)


@decodes("bfe")
def _extract(kernel, instruction):
    type_ = instruction.opcode[-1]
    bits = 8 * size_of(type_)

    def extract(x, start, length):
        start, length = np.minimum(start, bits), np.minimum(length, bits)
        up = np.maximum(bits - start.astype(np.int64) - length, 0).astype(x.dtype)
        down = np.minimum(bits - length.astype(np.int64), bits - 1).astype(x.dtype)
        return np.where(length == 0, x.dtype.type(0), (x << up) >> down)

    return applying(kernel, instruction, [type_, "u32", "u32"], extract)


@decodes("bfi")
def _insert(kernel, instruction):
    def insert(field, into, start, length):
        mask = ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)) << start.astype(np.uint64)
        placed = field.astype(np.uint64) << start.astype(np.uint64)
        return (into.astype(np.uint64) & ~mask | placed & mask).astype(into.dtype)

    type_ = instruction.opcode[-1]
    return applying(kernel, instruction, [type_, type_, "u32", "u32"], insert)


@decodes("prmt")
def _permute(kernel, instruction):
    if instruction.opcode != ("prmt", "b32"):
        raise PtxError(f"not modelled: {instruction.text}")

    def permute(a, b, selector):
        source = np.ascontiguousarray(np.stack([a, b], 1)).view(np.uint8)  # the eight bytes, lowest first
        nibbles = (selector[:, None] >> (4 * np.arange(4, dtype=np.uint32))) & np.uint32(15)
        chosen = np.take_along_axis(source, (nibbles & 7).astype(np.int64), 1)
        signs = np.where(chosen & 0x80, 0xFF, 0).astype(np.uint8)
        return np.ascontiguousarray(np.where(nibbles & 8, signs, chosen)).view(np.uint32)[:, 0]

    return applying(kernel, instruction, ["b32"] * 3, permute)


@decodes("popc", "clz", "brev")
def _bits(kernel, instruction):
    width = 8 * size_of(instruction.opcode[-1])
    function = {
        "popc": lambda x: int(x).bit_count(),
        "clz": lambda x: width - int(x).bit_length(),
        "brev": lambda x: int(f"{int(x):0{width}b}"[::-1], 2),
    }[instruction.opcode[0]]
    type_ = f"b{width}"
    result = RAW[width // 8] if instruction.opcode[0] == "brev" else np.uint32
    return applying(kernel, instruction, [type_], lambda x: np.array([function(v) for v in x], result))


COMPARISONS = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
COMBINATIONS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@decodes("setp")
def _compare(kernel, instruction):
    """setp.comparison[.combination].type p[|q], a, b[, c]"""
    name, type_ = instruction.opcode[1], instruction.opcode[-1]
    combine = COMBINATIONS.get(instruction.opcode[2])
    put = [writer(kernel, one) for one in instruction.operands[0].split("|")]
    x, y = (reader(kernel, one, type_) for one in instruction.operands[1:3])
    third = reader(kernel, instruction.operands[3], "pred") if combine else None

    def compared(a, b):
        if type_ in ("f16", "bf16"):
            a, b = numbers(a.view(np.uint16), type_), numbers(b.view(np.uint16), type_)
        if name in ("num", "nan"):
            return (np.isnan(a) | np.isnan(b)) == (name == "nan")
        if name in COMPARISONS:
            ordered = COMPARISONS[name](a, b)
            return ordered & ~(np.isnan(a) | np.isnan(b)) if a.dtype.kind == "f" and name == "ne" else ordered
        return COMPARISONS[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)  # "ltu": also when unordered

    def action(warp, lanes):
        result = compared(x(warp), y(warp))
        for write, value in zip(put, (result, ~result), strict=False):
            write(warp, lanes, combine(value, third(warp)) if combine else value)

    return action


@decodes("selp")
def _select(kernel, instruction):
    type_ = instruction.opcode[-1]
    return applying(kernel, instruction, [type_, type_, "pred"], lambda a, b, p: np.where(p, a, b))


@decodes("cvta")
def _to_address(kernel, instruction):
    return applying(kernel, instruction, [instruction.opcode[-1]], lambda a: a)


@decodes("mov")
def _move(kernel, instruction):
    target, source = instruction.operands
    if source.startswith("{"):  # parts into one register, lowest first
        parts = elements(source)
        size = np.dtype(register_raw(kernel, target)).itemsize // len(parts)
        get = [reader(kernel, part, f"b{8 * size}") for part in parts]
        put = writer(kernel, target)
        raw = RAW[size * len(parts)]

        def pack(warp, lanes):
            put(warp, lanes, np.stack([read(warp) for read in get], 1).view(raw)[:, 0])

        return pack
    if target.startswith("{"):  # one register into parts
        parts = elements(target)
        whole = reader(kernel, source, instruction.opcode[-1])
        puts = [writer(kernel, part) for part in parts]
        raw = RAW[size_of(instruction.opcode[-1]) // len(parts)]

        def unpack(warp, lanes):
            split = np.ascontiguousarray(whole(warp)).view(raw).reshape(32, len(parts))
            for i, put in enumerate(puts):
                put(warp, lanes, split[:, i])

        return unpack
    return applying(kernel, instruction, [instruction.opcode[-1]], lambda a: a)


ROUND_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@decodes("cvt")
def _convert(kernel, instruction):
    """cvt[.rounding][.ftz][.sat].to.from"""
    to, source = instruction.opcode[-2:]
    modes = set(instruction.opcode[1:-2])
    if unknown := modes - {"rn", "rna", "ftz", "sat", *ROUND_TO_INTEGER}:
        raise PtxError(f"not modelled: {sorted(unknown)} in {instruction.text}")
    if to in ("f16x2", "bf16x2"):  # the first operand goes into the high half
        return applying(
            kernel, instruction, [source] * 2, lambda high, low: pair(narrowed(low, to), narrowed(high, to))
        )
    if to == "tf32":
        return applying(kernel, instruction, [source], to_tf32)

    def convert(x):
        if source in ("bf16", "f16"):
            x = numbers(x.view(np.uint16), source)
        for mode in modes & set(ROUND_TO_INTEGER):
            x = ROUND_TO_INTEGER[mode](x)
        if "sat" in modes:
            x = np.clip(x, *((0, 1) if TYPES[to] in (np.float32, np.float16) else _range(to)))
        if to in ("bf16", "f16"):
            return narrowed(x.astype(np.float32), to)
        if x.dtype.kind == "f" and to[0] in "us":
            return _to_integer(x, to)
        return as_type(x, to) if to[0] == "b" else x.astype(TYPES[to])

    return applying(kernel, instruction, [source], convert)


def _range(type_):
    limits = np.iinfo(TYPES[type_])
    return limits.min, limits.max


def _to_integer(x, type_):
    """Clamped, as the GPU does; NaN becomes zero."""
    low, high = _range(type_)
    clamped = np.clip(np.nan_to_num(x.astype(np.float64), nan=0), low, np.nextafter(float(high), 0))
    return np.where(x >= high, TYPES[type_](high), clamped.astype(TYPES[type_]))
