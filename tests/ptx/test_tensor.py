"""Matrix products and ldmatrix: fragments laid out as the PTX manual says, multiplied as numpy does."""

import numpy as np
import pytest
import torch
from ptx.errors import PtxError
from ptx.execute import launch
from ptx.parse import parse

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def loads(name, source, words):
    """ld.global of each lane's ``words`` registers, laid out [32, words] in memory."""
    return f"mul.wide.u32 %d3, %r1, {4 * words}; add.s64 %d4, {source}, %d3;" + "".join(
        f"ld.global.b32 %{name}{i}, [%d4+{4 * i}];" for i in range(words)
    )


def registers(name, count):
    return "{" + ", ".join(f"%{name}{i}" for i in range(count)) + "}"


def multiply(shape, type_, a, b, c):
    """a, b, c: [32, registers] of the lanes."""
    in_a, in_b, in_c = (registers(name, v.shape[1]) for name, v in zip("abc", (a, b, c), strict=True))
    out = np.zeros((32, 4), np.float32)
    text = f"""
        .entry kernel(.param .u64 a, .param .u64 b, .param .u64 c, .param .u64 out) {{
            .reg .b32 %a<9>; .reg .b32 %b<9>; .reg .f32 %c<9>; .reg .b32 %r<9>; .reg .b64 %d<9>; .reg .b64 %p<9>;
            ld.param.u64 %p1, [a]; ld.param.u64 %p2, [b]; ld.param.u64 %p3, [c]; ld.param.u64 %p4, [out];
            mov.u32 %r1, %tid.x;
            {loads("a", "%p1", a.shape[1])} {loads("b", "%p2", b.shape[1])} {loads("c", "%p3", 4)}
            mma.sync.aligned.{shape}.row.col.f32.{type_}.{type_}.f32 {in_c}, {in_a}, {in_b}, {in_c};
            add.s64 %d4, %p4, %d3; st.global.v4.f32 [%d4], {in_c}; ret; }}"""
    buffers = {"a": a, "b": b, "c": c, "out": out}
    arguments = [np.uint64(v.ctypes.data) for v in buffers.values()]
    counts = launch(parse(text), (1, 1, 1), (32, 1, 1), arguments, buffers)
    assert counts.executed("mma", shape) == 1
    return out


@pytest.mark.parametrize("type_", ["bf16", "f16"])
@pytest.mark.parametrize("k", [8, 16])
def test_products_of_sixteen_bits(type_, k):
    a, b = (torch.randn(shape).to(DTYPES[type_]) for shape in ((16, k), (k, 8)))
    c = np.random.default_rng().standard_normal((16, 8)).astype(np.float32)
    lanes = [(lane // 4, lane % 4) for lane in range(32)]
    # registers of A: rows g and g+8, columns 2t, 2t+1 and, for k = 16, 8 further on
    parts_a = [(row, column) for column in range(0, k, 8) for row in (0, 8)]
    words_a = torch.stack([torch.cat([a[g + r, 2 * t + q : 2 * t + q + 2] for r, q in parts_a]) for g, t in lanes])
    words_b = torch.stack([torch.cat([b[2 * t + q : 2 * t + q + 2, g] for q in range(0, k, 8)]) for g, t in lanes])
    words_c = np.stack([np.concatenate([c[g, 2 * t : 2 * t + 2], c[g + 8, 2 * t : 2 * t + 2]]) for g, t in lanes])
    raw = [np.ascontiguousarray(w.view(torch.int16).numpy()).view(np.uint32) for w in (words_a, words_b)]
    out = multiply(f"m16n8k{k}", type_, *raw, np.ascontiguousarray(words_c))
    expected = (a.double() @ b.double()).numpy() + c
    for lane, (g, t) in enumerate(lanes):
        wanted = np.concatenate([expected[g, 2 * t : 2 * t + 2], expected[g + 8, 2 * t : 2 * t + 2]])
        assert np.array_equal(out[lane], wanted.astype(np.float32))


@pytest.mark.parametrize("k", [4, 8])
def test_products_of_tf32_ignore_the_low_bits(k):
    random = np.random.default_rng()
    a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((16, k), (k, 8)))
    lanes = [(lane // 4, lane % 4) for lane in range(32)]
    words_a = np.stack([[a[g + r, t + q] for q in range(0, k, 4) for r in (0, 8)] for g, t in lanes])
    words_b = np.stack([[b[t + q, g] for q in range(0, k, 4)] for g, t in lanes])
    zero = np.zeros((32, 4), np.float32)
    out = multiply(f"m16n8k{k}", "tf32", words_a.view(np.uint32), words_b.view(np.uint32), zero)
    short = [(v.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64) for v in (a, b)]
    expected = (short[0] @ short[1]).astype(np.float32)
    for lane, (g, t) in enumerate(lanes):
        assert np.array_equal(out[lane, :2], expected[g, 2 * t : 2 * t + 2])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, transposed):
    """Rows of 8 values from shared memory, a lane's pair from its row, or its column when transposed."""
    matrices = np.random.default_rng().integers(0, 1 << 16, (4, 8, 8), np.uint16)
    out = np.zeros((32, count), np.uint32)
    targets = "{" + ", ".join(f"%r{i}" for i in range(10, 10 + count)) + "}"
    stores = "".join(f"st.global.b32 [%d6+{4 * i}], %r{10 + i};" for i in range(count))
    text = f"""
        .entry kernel(.param .u64 in, .param .u64 out) {{
            .reg .b32 %r<20>; .reg .b64 %d<9>; .shared .align 16 .b8 tile[512];
            ld.param.u64 %d1, [in]; ld.param.u64 %d2, [out]; mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 4;
            mov.u32 %r3, tile; add.s32 %r4, %r3, %r2; mul.wide.u32 %d3, %r1, 16; add.s64 %d4, %d1, %d3;
            ld.global.v4.b32 {{%r5, %r6, %r7, %r8}}, [%d4]; st.shared.v4.b32 [%r4], {{%r5, %r6, %r7, %r8}};
            bar.sync 0;
            ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16 {targets}, [%r4];
            mul.wide.u32 %d5, %r1, {4 * count}; add.s64 %d6, %d2, %d5; {stores} ret; }}"""
    buffers = {"in": matrices, "out": out}
    launch(parse(text), (1, 1, 1), (32, 1, 1), [np.uint64(v.ctypes.data) for v in buffers.values()], buffers)
    for lane in range(32):
        for i in range(count):
            source = matrices[i].T if transposed else matrices[i]
            low, high = source[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
            assert out[lane, i] == int(low) | int(high) << 16


def test_a_shape_that_is_not_modelled_is_refused():
    words = np.zeros((32, 4), np.uint32)
    with pytest.raises(PtxError, match=r"not understood|not modelled"):
        multiply("m8n8k4", "f16", words, words, words.view(np.float32))
