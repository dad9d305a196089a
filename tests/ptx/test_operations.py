"""Each instruction on random operands against Python's integers, numpy's floats or torch's conversions."""

import numpy as np
import pytest
import torch
from ptx.errors import PtxError
from ptx.execute import launch
from ptx.parse import parse

EDGES = {
    "b16": [0, 1, 0x7FFF, 0x8000, 0xFFFF],
    "b32": [0, 1, 31, 32, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF],
    "b64": [0, 1, 63, 64, 1 << 63, (1 << 64) - 1],
}


def bits(width, count=32):
    edges = EDGES[f"b{width}"]
    drawn = np.random.default_rng().integers(0, 1 << width, count - len(edges), np.uint64, endpoint=False)
    return np.random.default_rng().permutation(np.concatenate([drawn, np.array(edges, np.uint64)]))


def operate(instruction, *columns, out=32):
    """``instruction`` with $0 for its result and $1, $2 … for columns [32] of operands (as unsigned integers)."""
    operands = np.stack([np.asarray(column, np.uint64) for column in columns])
    result = np.zeros(32, np.uint64)
    loads = "".join(f"ld.global.u64 %d{i + 1}, [%a1+{256 * i}];" for i in range(len(columns)))
    narrow = "".join(f"cvt.u32.u64 %r{i}, %d{i}; cvt.u16.u64 %h{i}, %d{i};" for i in range(1, len(columns) + 1))
    wide = {16: "%h0", 32: "%r0", 64: "%d0"}[out]
    text = f"""
        .entry kernel(.param .u64 in, .param .u64 out) {{
            .reg .b16 %h<9>; .reg .b32 %r<12>; .reg .b64 %d<9>; .reg .b64 %a<5>; .reg .pred %p<5>; .reg .f32 %f<5>;
            ld.param.u64 %a1, [in]; ld.param.u64 %a2, [out];
            mov.u32 %r9, %tid.x; mul.wide.u32 %a3, %r9, 8; add.s64 %a1, %a1, %a3; add.s64 %a2, %a2, %a3;
            {loads} {narrow} {instruction} {f"cvt.u64.u{out} %d0, {wide};" if out < 64 else ""}
            st.global.u64 [%a2], %d0; ret; }}"""
    arguments = [np.uint64(operands.ctypes.data), np.uint64(result.ctypes.data)]
    launch(parse(text), (1, 1, 1), (32, 1, 1), arguments, {"in": operands, "out": result})
    return result


def signed(value, width):
    value = int(value)
    return value - (1 << width) if value >> (width - 1) else value


def reg(width, i):
    return f"%{ {16: 'h', 32: 'r', 64: 'd'}[width] }{i}"


INTEGER = {
    "add.s{w}": lambda a, b, w: a + b,
    "sub.s{w}": lambda a, b, w: a - b,
    "mul.lo.s{w}": lambda a, b, w: a * b,
    "mul.hi.u{w}": lambda a, b, w: a * b >> w,
    "mul.hi.s{w}": lambda a, b, w: signed(a, w) * signed(b, w) >> w,
    "and.b{w}": lambda a, b, w: a & b,
    "or.b{w}": lambda a, b, w: a | b,
    "xor.b{w}": lambda a, b, w: a ^ b,
    "min.s{w}": lambda a, b, w: min(signed(a, w), signed(b, w)),
    "max.u{w}": lambda a, b, w: max(a, b),
    "div.u{w}": lambda a, b, w: a // b if b else None,
    "rem.u{w}": lambda a, b, w: a % b if b else None,
    "div.s{w}": lambda a, b, w: _truncated(signed(a, w), signed(b, w))[0] if b else None,
    "rem.s{w}": lambda a, b, w: _truncated(signed(a, w), signed(b, w))[1] if b else None,
}


def _truncated(a, b):
    quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return quotient, a - quotient * b


@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize("opcode", INTEGER)
def test_integer(opcode, width):
    if "mul.hi.s" in opcode and width == 16:
        width = 32
    a, b = bits(width), bits(width)
    text = f"{opcode.format(w=width)} {reg(width, 0)}, {reg(width, 1)}, {reg(width, 2)};"
    out = operate(text, a, b, out=width)
    for got, x, y in zip(out, a, b, strict=True):
        expected = INTEGER[opcode](int(x), int(y), width)
        assert expected is None or int(got) == expected % (1 << width), (opcode, hex(x), hex(y))


def test_wide_products():
    a, b, c = bits(32), bits(32), bits(64)
    out = operate("mul.wide.u32 %d0, %r1, %r2;", a, b, out=64)
    assert [int(v) for v in out] == [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    out = operate("mad.wide.s32 %d0, %r1, %r2, %d3;", a, b, c, out=64)
    expected = [signed(x, 32) * signed(y, 32) + int(z) for x, y, z in zip(a, b, c, strict=True)]
    assert [int(v) for v in out] == [e % (1 << 64) for e in expected]
    out = operate("mad.lo.s32 %r0, %r1, %r2, %r3;", a, b, c)
    expected = [int(x) * int(y) + int(z) for x, y, z in zip(a, b, c, strict=True)]
    assert [int(v) for v in out] == [e % (1 << 32) for e in expected]


SHIFTS = {
    "shl.b{w}": lambda a, n, w: a << n,
    "shr.u{w}": lambda a, n, w: a >> n,
    "shr.s{w}": lambda a, n, w: signed(a, w) >> n,
}


@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize("opcode", SHIFTS)
def test_shifts_go_beyond_the_width(opcode, width):
    a, by = bits(width), np.arange(32) * 3
    out = operate(f"{opcode.format(w=width)} {reg(width, 0)}, {reg(width, 1)}, %r2;", a, by, out=width)
    expected = [SHIFTS[opcode](int(x), int(n), width) % (1 << width) for x, n in zip(a, by, strict=True)]
    assert [int(v) for v in out] == expected


def test_funnel_shifts():
    low, high, by = bits(32), bits(32), np.arange(32) * 2
    pairs = [int(x) | int(y) << 32 for x, y in zip(low, high, strict=True)]
    out = operate("shf.l.wrap.b32 %r0, %r1, %r2, %r3;", low, high, by)
    assert [int(v) for v in out] == [(p << int(n) % 32) >> 32 & 0xFFFFFFFF for p, n in zip(pairs, by, strict=True)]
    out = operate("shf.r.clamp.b32 %r0, %r1, %r2, %r3;", low, high, by)
    assert [int(v) for v in out] == [p >> min(int(n), 32) & 0xFFFFFFFF for p, n in zip(pairs, by, strict=True)]


@pytest.mark.parametrize("table", [0xE8, 0x96, 0xCA, 0x01, 0xFE])
def test_lop3_looks_every_bit_up(table):
    a, b, c = bits(32), bits(32), bits(32)
    out = operate(f"lop3.b32 %r0, %r1, %r2, %r3, {table:#x};", a, b, c)
    for got, x, y, z in zip(out, a, b, c, strict=True):
        for bit in range(32):
            index = (int(x) >> bit & 1) << 2 | (int(y) >> bit & 1) << 1 | int(z) >> bit & 1
            assert int(got) >> bit & 1 == table >> index & 1


def test_bit_fields():
    a, b = bits(32), bits(32)
    out = operate("bfe.u32 %r0, %r1, 5, 9;", a)
    assert [int(v) for v in out] == [int(x) >> 5 & 0x1FF for x in a]
    out = operate("bfe.s32 %r0, %r1, 0, 7;", a)
    assert [int(v) for v in out] == [signed(int(x) & 0x7F, 7) % (1 << 32) for x in a]
    out = operate("bfi.b32 %r0, %r1, %r2, 4, 8;", a, b)
    assert [int(v) for v in out] == [int(y) & ~0xFF0 | (int(x) & 0xFF) << 4 for x, y in zip(a, b, strict=True)]
    out = operate("popc.b32 %r0, %r1;", a)
    assert [int(v) for v in out] == [bin(x).count("1") for x in a]
    out = operate("clz.b32 %r0, %r1;", a)
    assert [int(v) for v in out] == [32 - int(x).bit_length() for x in a]


@pytest.mark.parametrize("selector", [0x5410, 0x7632, 0x3210, 0xBA98, 0x0123])
def test_prmt_chooses_bytes(selector):
    a, b = bits(32), bits(32)
    out = operate(f"prmt.b32 %r0, %r1, %r2, {selector:#x};", a, b)
    for got, x, y in zip(out, a, b, strict=True):
        source = int(x).to_bytes(4, "little") + int(y).to_bytes(4, "little")
        chosen = [selector >> 4 * i & 15 for i in range(4)]
        expected = [(0xFF if source[n & 7] & 0x80 else 0) if n & 8 else source[n] for n in chosen]
        assert int(got) == int.from_bytes(bytes(expected), "little")


@pytest.mark.parametrize("name", ["lt", "le", "gt", "ge", "eq", "ne"])
def test_comparisons(name):
    a, b = bits(32), bits(32)
    b[::3] = a[::3]
    compare = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}[name]
    for type_, read in (("s32", lambda v: signed(v, 32)), ("u32", int)):
        out = operate(f"setp.{name}.{type_} %p1, %r1, %r2; selp.b32 %r0, 1, 0, %p1;", a, b)
        assert [int(v) for v in out] == [eval(f"{read(x)} {compare} {read(y)}") for x, y in zip(a, b, strict=True)]


def floats(count=32):
    return np.random.default_rng().standard_normal(count).astype(np.float32)


def as_bits(values):
    return values.view({2: np.uint16, 4: np.uint32}[values.dtype.itemsize]).astype(np.uint64)


def as_floats(result):
    return result.astype(np.uint32).view(np.float32)


def test_fp32():
    a, b, c = floats(), floats(), floats()
    columns = [as_bits(v) for v in (a, b, c)]
    assert np.array_equal(as_floats(operate("add.f32 %r0, %r1, %r2;", *columns)), a + b)
    assert np.array_equal(as_floats(operate("div.rn.f32 %r0, %r1, %r2;", *columns)), a / b)
    exact = torch.from_numpy(a).double() * torch.from_numpy(b).double() + torch.from_numpy(c).double()
    assert np.array_equal(as_floats(operate("fma.rn.f32 %r0, %r1, %r2, %r3;", *columns)), exact.float().numpy())


def test_nan_is_unordered_and_loses_against_a_number():
    a, b = floats(), floats()
    a[::2] = np.nan
    columns = [as_bits(a), as_bits(b)]
    assert np.array_equal(as_floats(operate("max.f32 %r0, %r1, %r2;", *columns)), np.fmax(a, b))
    assert np.isnan(as_floats(operate("max.NaN.f32 %r0, %r1, %r2;", *columns))[::2]).all()
    for name, expected in (("lt", a < b), ("ltu", ~(a >= b)), ("ne", (a != b) & ~np.isnan(a)), ("neu", a != b)):
        out = operate(f"setp.{name}.f32 %p1, %r1, %r2; selp.b32 %r0, 1, 0, %p1;", *columns)
        assert np.array_equal(out.astype(bool), expected), name


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_sixteen_bits(name, dtype):
    a, b = floats() * 100, floats()
    a[3] = np.nan
    low, high = torch.from_numpy(a).to(dtype), torch.from_numpy(b).to(dtype)
    out = operate(f"cvt.rn.{name}x2.f32 %r0, %r1, %r2;", as_bits(b), as_bits(a))
    split = torch.from_numpy(out.astype(np.uint32).view(np.uint16).reshape(32, 2).copy().view(np.int16)).view(dtype)
    assert torch.equal(split[:, 1], high) and torch.equal(split[4:, 0], low[4:]) and split[3, 0].isnan()
    words = as_bits(high.view(torch.int16).numpy())
    assert np.array_equal(as_floats(operate(f"cvt.f32.{name} %r0, %h1;", words)), high.float().numpy())
    pairs = as_bits(np.stack([v.view(torch.int16).numpy() for v in (high, high)], 1).copy().view(np.uint32)[:, 0])
    out = operate(f"mul.rn.{name}x2 %r0, %r1, %r1;", pairs)
    assert np.array_equal(out >> np.uint64(16), as_bits((high * high).view(torch.int16).numpy()))


def test_tf32_rounds_to_ten_bits():
    a = floats()
    out = as_floats(operate("cvt.rna.tf32.f32 %r0, %r1;", as_bits(a)))
    assert (out.view(np.uint32) & 0x1FFF == 0).all() and (np.abs(out - a) <= np.abs(a) * 2.0**-11).all()


def test_conversions_between_floats_and_integers():
    a = floats() * 1000
    a[:3] = np.nan, 1e20, -1e20
    out = operate("cvt.rzi.s32.f32 %r0, %r1;", as_bits(a)).astype(np.uint32).view(np.int32)
    assert out[:3].tolist() == [0, 2**31 - 1, -(2**31)] and np.array_equal(out[3:], np.trunc(a[3:]).astype(np.int32))
    whole = bits(32)
    out = as_floats(operate("cvt.rn.f32.u32 %r0, %r1;", whole))
    assert np.array_equal(out, whole.astype(np.float32))
    out = operate("cvt.s64.s32 %d0, %r1;", whole, out=64)
    assert [int(v) for v in out] == [signed(v, 32) % (1 << 64) for v in whole]


@pytest.mark.parametrize("mode", ["bfly", "idx", "down", "up"])
def test_shuffles(mode):
    a = bits(32)
    out = operate(f"shfl.sync.{mode}.b32 %r0|%p1, %r1, 5, {0 if mode == 'up' else 31}, -1;", a)
    lanes = np.arange(32)
    source = {"bfly": lanes ^ 5, "idx": lanes * 0 + 5, "down": lanes + 5, "up": lanes - 5}[mode]
    source = np.where((source < 0) | (source > 31), lanes, source)
    assert np.array_equal(out, a[source])


def test_votes():
    a = bits(32)
    out = operate("setp.lt.s32 %p1, %r1, 0; vote.sync.ballot.b32 %r0, %p1, -1;", a)
    assert int(out[0]) == sum(1 << i for i, v in enumerate(a) if int(v) >> 31)


def test_lanes_part_and_meet_again():
    """Each lane loops as often as its number says; behind the loop all shuffle together."""
    body = """
        mov.u32 %r0, 0; mov.u32 %r3, 0;
        loop: setp.ge.u32 %p1, %r3, %r9; @%p1 bra done; add.s32 %r0, %r0, %r1; add.s32 %r3, %r3, 1; bra loop;
        done: shfl.sync.bfly.b32 %r0, %r0, 1, 31, -1;"""
    a = bits(32)
    expected = [int(x) * lane % (1 << 32) for lane, x in enumerate(a)]
    assert [int(v) for v in operate(body, a)] == [expected[lane ^ 1] for lane in range(32)]


def test_registers_are_packed_and_split():
    a, b = bits(16), bits(16)
    out = operate("mov.b32 %r0, {%h1, %h2};", a, b)
    assert [int(v) for v in out] == [int(x) | int(y) << 16 for x, y in zip(a, b, strict=True)]
    words = bits(32)
    assert np.array_equal(operate("mov.b32 {%h3, %h0}, %r1;", words, out=16), words >> np.uint64(16))


def test_an_unknown_opcode_is_named():
    with pytest.raises(PtxError, match=r"opcode not modelled: sin\.approx"):
        operate("sin.approx.f32 %r0, %r1;", bits(32))
