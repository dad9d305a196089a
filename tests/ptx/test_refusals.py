"""What the interpreter refuses, because a GPU would fault on it or leave the result undefined."""

import numpy as np
import pytest
from ptx.errors import PtxError
from ptx.execute import launch
from ptx.parse import parse

HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n.extern .shared .align 16 .b8 dynamic[];\n"
DECLARATIONS = ".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<20>; .reg .f32 %f<9>; .reg .b64 %d<9>;"
THREAD = """
    ld.param.u64 %d1, [in]; ld.param.u64 %d2, [out];
    mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x;
    mul.wide.u32 %d3, %r1, 4;
    mov.u32 %r10, tile; shl.b32 %r11, %r1, 2; add.s32 %r12, %r10, %r11;
"""


def run(body, threads=32, grid=1, seed=0, shared=".shared .align 16 .b8 tile[512];", dynamic=0):
    """A kernel that reads ``in`` (64 floats) and writes ``out``; %d3 = 4·thread, %r12 = its word of ``tile``."""
    text = f"{HEADER}.entry kernel(.param .u64 in, .param .u64 out) {{ {DECLARATIONS} {shared} {THREAD} {body} ret; }}"
    given, out = np.arange(64, dtype=np.float32), np.full(64, np.nan, np.float32)
    arguments = [np.uint64(given.ctypes.data), np.uint64(out.ctypes.data)]
    counts = launch(parse(text), (grid, 1, 1), (threads, 1, 1), arguments, {"in": given, "out": out}, dynamic, seed)
    return out, counts


def refused(match, body, **options):
    with pytest.raises(PtxError, match=match):
        run(body, **options)


TO_SHARED = "add.s64 %d4, %d1, %d3; ld.global.f32 %f1, [%d4]; st.shared.f32 [%r12], %f1;"
FROM_NEIGHBOUR = """
    xor.b32 %r13, %r11, 128; add.s32 %r13, %r10, %r13; ld.shared.f32 %f2, [%r13];
    add.s64 %d5, %d2, %d3; st.global.f32 [%d5], %f2;
"""  # the thread of the other warp


@pytest.mark.parametrize("seed", range(4))
def test_values_pass_between_warps_behind_a_barrier(seed):
    out, _ = run(TO_SHARED + "bar.sync 0;" + FROM_NEIGHBOUR, threads=64, seed=seed)
    assert np.array_equal(out, np.arange(64) ^ 32)


@pytest.mark.parametrize("seed", range(4))
def test_without_the_barrier_it_is_a_race(seed):
    refused("race in shared memory: offset", TO_SHARED + FROM_NEIGHBOUR, threads=64, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_writing_what_another_warp_still_reads_is_a_race(seed):
    again = "mov.f32 %f3, 0f40000000; st.shared.f32 [%r12], %f3;"
    refused("race in shared memory", TO_SHARED + "bar.sync 0;" + FROM_NEIGHBOUR + again, threads=64, seed=seed)
    run(TO_SHARED + "bar.sync 0;" + FROM_NEIGHBOUR + "bar.sync 0;" + again, threads=64, seed=seed)


def test_all_warps_may_store_the_same_value():
    out, _ = run(
        "mov.f32 %f1, 0f40400000; st.shared.f32 [%r10], %f1; bar.sync 0; ld.shared.f32 %f2, [%r10];"
        "add.s64 %d5, %d2, %d3; st.global.f32 [%d5], %f2;",
        threads=64,
    )
    assert (out == 3).all()


def test_blocks_that_write_one_byte_race():
    body = "add.s64 %d5, %d2, %d3; cvt.rn.f32.u32 %f1, %r2; st.global.f32 [%d5], %f1;"
    run(body)
    refused("race in global memory: byte 0 of 'out', block 1 and block 0", body, grid=2)


def test_a_block_may_not_read_what_another_writes():
    body = """
        setp.eq.u32 %p1, %r2, 0; add.s64 %d5, %d2, %d3;
        @%p1 st.global.f32 [%d5], 0f3F800000; @!%p1 ld.global.f32 %f1, [%d5];
    """
    for seed in range(1, 5):  # in whichever order they run
        refused("race in global memory", body, grid=2, seed=seed)


@pytest.mark.parametrize("access", ["ld.global.f32 %f1, [%d4+132];", "st.global.f32 [%d4+-4], %f1;"])
def test_global_bounds_are_exact(access):
    refused("out of bounds in global memory: 4 bytes", "add.s64 %d4, %d1, %d3;" + access)


def test_a_lane_that_is_off_may_point_anywhere():
    run("setp.lt.u32 %p1, %r1, 16; mul.wide.u32 %d3, %r1, 16; add.s64 %d4, %d1, %d3; @%p1 ld.global.f32 %f1, [%d4];")


@pytest.mark.parametrize("access", ["ld.shared.f32 %f1, [%r12+400];", "st.shared.f32 [%r12+-8], %f1;"])
def test_shared_bounds_are_exact(access):
    refused("out of bounds in shared memory", access)


def test_shared_memory_ends_with_the_dynamic_part():
    body = "mov.u32 %r13, dynamic; st.shared.f32 [%r13+252], %f1;"
    run(body, dynamic=256)
    refused("out of bounds in shared memory", body, dynamic=252)


@pytest.mark.parametrize(
    ("access", "space"),
    [
        ("ld.global.f32 %f1, [%d1+2];", "global"),
        ("ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%d1+8];", "global"),
        ("st.global.v2.f32 [%d2+4], {%f1, %f2};", "global"),
        ("ld.shared.v4.f32 {%f1, %f2, %f3, %f4}, [%r10+8];", "shared"),
        ("cp.async.cg.shared.global [%r10+8], [%d1], 16;", "shared"),
        ("cp.async.cg.shared.global [%r10], [%d1+8], 16;", "global"),
    ],
)
def test_vectors_are_aligned_to_their_size(access, space):
    refused(f"misaligned access to {space} memory", access, threads=1)


COPY = "shl.b32 %r13, %r1, 4; add.s32 %r14, %r10, %r13; mul.wide.u32 %d5, %r1, 16; add.s64 %d6, %d1, %d5;" + (
    "cp.async.cg.shared.global [%r14], [%d6], 16; cp.async.commit_group;"
)
READ = "ld.shared.f32 %f1, [%r12]; add.s64 %d7, %d2, %d3; st.global.f32 [%d7], %f1;"


def test_an_asynchronous_copy_arrives_with_the_wait():
    out, _ = run(COPY + "cp.async.wait_group 0; bar.sync 0;" + READ, threads=16)
    assert np.array_equal(out[:16], np.arange(16))


def test_reading_before_the_wait_is_refused():
    refused("read while a cp.async to it is in flight", COPY + "bar.sync 0;" + READ, threads=16)
    refused("in flight", COPY + "cp.async.wait_group 1; bar.sync 0;" + READ, threads=16)  # one may still be on its way


def test_the_wait_of_one_warp_is_no_barrier_for_the_other():
    copy_of_warp_0 = "setp.lt.u32 %p1, %r1, 16; @!%p1 bra next;" + COPY + "cp.async.wait_group 0; next:"
    body = copy_of_warp_0 + "{} xor.b32 %r15, %r12, 128; and.b32 %r15, %r15, -129; ld.shared.f32 %f1, [%r15];"
    run(body.format("bar.sync 0;"), threads=64)
    refused("race in shared memory", body.format(""), threads=64)


def test_refilling_what_another_warp_still_reads_is_a_race():
    body = TO_SHARED + "bar.sync 0;" + FROM_NEIGHBOUR + "setp.ge.u32 %p1, %r1, 16; @%p1 bra end;" + COPY + "end:"
    refused("race in shared memory", body, threads=64)


def test_an_asynchronous_copy_may_fill_with_zeros():
    skip = "mov.u32 %r15, 0; cp.async.cg.shared.global [%r14], [%d6], 16, %r15; cp.async.commit_group;"
    whole = COPY.partition("cp.async.cg")[0] + skip + "cp.async.wait_group 0; bar.sync 0;" + READ
    out, _ = run(whole, threads=16)
    assert (out[:16] == 0).all()


def test_a_barrier_that_half_a_warp_reaches_is_refused():
    refused("only a part of warp 0 reaches", "setp.lt.u32 %p1, %r1, 16; @%p1 bra skip; bar.sync 0; skip:")


@pytest.mark.parametrize("seed", range(3))
def test_a_barrier_that_an_ended_warp_never_reaches_is_a_deadlock(seed):
    refused("deadlock", "setp.lt.u32 %p1, %r1, 32; @%p1 ret; bar.sync 0;", threads=64, seed=seed)


def test_a_loop_without_an_end_is_refused(monkeypatch):
    monkeypatch.setattr("ptx.execute.MAX_STEPS", 1000)
    refused("still running", "again: bra again;")


def test_a_shuffle_from_a_lane_that_is_off_is_refused():
    refused("takes no part", "setp.lt.u32 %p1, %r1, 16; @%p1 shfl.sync.bfly.b32 %r3, %r1, 16, 31, -1;")


def test_an_address_tells_its_memory():
    body = """
        cvt.u64.u32 %d4, %r12; isspacep.shared %p1, %d4; isspacep.shared %p2, %d1; isspacep.global %p3, %d1;
        selp.f32 %f1, 0f3F800000, 0f00000000, %p1; selp.f32 %f2, 0f40000000, 0f00000000, %p2;
        selp.f32 %f3, 0f40800000, 0f00000000, %p3; add.f32 %f1, %f1, %f2; add.f32 %f1, %f1, %f3;
        add.s64 %d5, %d2, %d3; st.global.f32 [%d5], %f1;
    """
    out, _ = run(body)
    assert (out[:32] == 5).all()


def test_shared_memory_has_its_limits():
    refused("static shared memory; 49152 is the limit", "", shared=".shared .align 16 .b8 tile[49168];")
    refused("sm_80 has 166912", "", dynamic=166912)


@pytest.mark.parametrize(
    "body", ["atom.global.add.f32 %f1, [%d1], %f2;", "bar.sync 1;", "st.local.b32 [%r1], %r2;", "mov.u32 %r1, %clock;"]
)
def test_what_is_not_modelled_is_named(body):
    refused("not modelled", body)
