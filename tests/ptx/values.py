"""Types of PTX as numpy arrays over the 32 lanes of a warp.

A register holds raw bits (an unsigned integer of its size, or a bool for a predicate); an instruction says how it
reads them. bfloat16, which numpy lacks, is read as its bits and converted by the operations that compute with it.
"""

import struct

import numpy as np

LANES = np.arange(32)
RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES = {
    **{f"{kind}{8 * size}": RAW[size] for kind in "bu" for size in RAW},
    **{f"s{8 * size}": np.dtype(f"i{size}").type for size in RAW},
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "bf16": np.uint16,
    "bf16x2": np.uint32,
    "f16x2": np.uint32,
    "tf32": np.uint32,
    "pred": np.bool_,
}


def size_of(type_: str) -> int:
    return np.dtype(TYPES[type_]).itemsize


def as_type(bits: np.ndarray, type_: str) -> np.ndarray:
    """A register's bits read as a type; of a wider register the low bits."""
    wanted = np.dtype(TYPES[type_])
    if bits.dtype == np.bool_:
        return bits
    if bits.dtype.itemsize != wanted.itemsize:
        bits = bits.astype(RAW[wanted.itemsize])
    return bits.view(wanted)


def as_bits(value: np.ndarray, raw: type) -> np.ndarray:
    """A value as a register's bits; widened by its sign when it has one."""
    if raw is np.bool_:
        return value.astype(np.bool_)
    value = np.ascontiguousarray(value)
    if value.dtype == np.bool_:
        return value.astype(raw)
    if value.dtype.itemsize != np.dtype(raw).itemsize:
        value = value.astype(np.int64 if value.dtype.kind == "i" else np.uint64).astype(raw)
    return value.view(raw)


def constant(text: str, type_: str) -> np.ndarray:
    """A literal: 12, 0x1F, -1, or the bits of a float as 0f3F800000, 0d3FF0000000000000."""
    wanted = np.dtype(TYPES[type_])
    if text[:2] in ("0f", "0F"):
        number = struct.unpack(">f", bytes.fromhex(text[2:]))[0]
        kind = np.float64 if type_ == "f64" else np.float32
        return np.full(32, number, kind).view(wanted) if wanted.itemsize != 2 else np.full(32, number, wanted)
    if text[:2] in ("0d", "0D"):
        return np.full(32, struct.unpack(">d", bytes.fromhex(text[2:]))[0], np.float64).view(wanted)
    if type_ == "pred":
        return np.full(32, bool(int(text, 0)))
    bits = int(text.rstrip("U"), 0) & ((1 << 8 * wanted.itemsize) - 1)
    return np.full(32, bits, RAW[wanted.itemsize]).view(wanted)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(value: np.ndarray) -> np.ndarray:
    """To the nearest, ties to even."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    return np.where(np.isnan(value), 0x7FFF, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_tf32(value: np.ndarray) -> np.ndarray:
    """To the nearest, ties away from zero: the bits of a float whose low 13 are zero (cvt.rna.tf32)."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    return (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)


def pair(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two 16-bit values in one 32-bit register."""
    return low.view(np.uint16).astype(np.uint32) | (high.view(np.uint16).astype(np.uint32) << 16)


def halves(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (bits & 0xFFFF).astype(np.uint16), (bits >> 16).astype(np.uint16)


def numbers(bits: np.ndarray, type_: str) -> np.ndarray:
    """16-bit values as fp32."""
    return from_bf16(bits) if type_.startswith("bf16") else bits.view(np.float16).astype(np.float32)


def narrowed(value: np.ndarray, type_: str) -> np.ndarray:
    """fp32 to 16 bits, to the nearest."""
    return to_bf16(value) if type_.startswith("bf16") else value.astype(np.float16).view(np.uint16)
