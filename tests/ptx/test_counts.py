"""Sectors of global memory and banks of shared memory, counted for patterns whose counts are known."""

import numpy as np
import pytest
from ptx.execute import launch
from ptx.memory import Access, SharedMemory
from ptx.parse import SHARED_BASE, parse


def global_access(size, stride, offset=0):
    """One warp reads ``size`` bytes a lane, ``stride`` bytes apart."""
    names = {4: ("", "%r5"), 8: (".v2", "{%r5, %r6}"), 16: (".v4", "{%r5, %r6, %r7, %r8}")}
    vector, registers = names[size]
    text = f"""
        .entry kernel(.param .u64 in) {{
            .reg .b32 %r<9>; .reg .b64 %d<5>;
            ld.param.u64 %d1, [in]; mov.u32 %r1, %tid.x; mul.wide.u32 %d2, %r1, {stride}; add.s64 %d3, %d1, %d2;
            ld.global{vector}.b32 {registers}, [%d3+{offset}];
            ret; }}"""
    memory = np.zeros(8192, np.uint8)
    start = -memory.ctypes.data % 128
    memory = memory[start : start + 8064]
    counts = launch(parse(text), (1, 1, 1), (32, 1, 1), [np.uint64(memory.ctypes.data)], {"in": memory})
    (access,) = counts.globals
    assert access.requested == counts.memory.buffers["in"].requested("read", size) == 32 * size
    assert counts.memory.buffers["in"].unique("read") == min(stride or size, size) * (32 if stride else 1)
    return access.transactions, access.fewest


@pytest.mark.parametrize(
    ("size", "stride", "offset", "sectors", "fewest"),
    [
        (4, 4, 0, 4, 4),  # side by side
        (16, 16, 0, 16, 16),
        (4, 4, 4, 5, 4),  # begins inside a sector
        (4, 8, 0, 8, 4),  # every second word
        (4, 32, 0, 32, 4),  # a sector a lane
        (8, 64, 0, 32, 8),
        (4, 0, 0, 1, 1),  # all the same word
    ],
)
def test_sectors(size, stride, offset, sectors, fewest):
    assert global_access(size, stride, offset) == (sectors, fewest)


def banks(offsets, size):
    lanes = np.arange(len(offsets))
    memory = SharedMemory(1 << 15, accesses := {})
    memory.count(0, "", np.array(offsets, np.uint64) + np.uint64(SHARED_BASE), size, lanes)
    access: Access = accesses[0]
    return access.transactions, access.fewest


@pytest.mark.parametrize(
    ("pattern", "size", "passes", "fewest"),
    [
        (lambda lane: 4 * lane, 4, 1, 1),
        (lambda lane: 8 * lane, 4, 2, 1),  # even banks only
        (lambda lane: 128 * lane, 4, 32, 1),  # a column of a row of 32 words
        (lambda lane: 132 * lane, 4, 1, 1),  # the same, rows padded by a word
        (lambda lane: 0, 4, 1, 1),  # broadcast
        (lambda lane: 2 * lane, 2, 1, 1),  # two lanes a word
        (lambda lane: 8 * lane, 8, 2, 2),  # half a warp a pass
        (lambda lane: 16 * lane, 16, 4, 4),  # a quarter of a warp a pass
        (lambda lane: 128 * lane, 16, 32, 4),  # all rows begin at the same bank
        (lambda lane: 128 * (lane % 8) + 16 * (lane % 8 ^ lane // 8), 16, 4, 4),  # swizzled
    ],
)
def test_passes_over_the_banks(pattern, size, passes, fewest):
    assert banks([pattern(lane) for lane in range(32)], size) == (passes, fewest)


def test_lanes_that_are_off_take_no_pass():
    assert banks([4 * lane for lane in range(3)], 4) == (1, 1)
