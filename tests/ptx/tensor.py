"""Instructions of a whole warp: matrix products, ldmatrix, shuffles, votes."""

import numpy as np
from ptx.arithmetic import decodes
from ptx.errors import PtxError
from ptx.operands import addresses, elements, reader, writer
from ptx.values import LANES, numbers

GROUP, MEMBER = LANES // 4, LANES % 4  # PTX's "groupID" and "threadID_in_group"


def _places(values, row, column):
    """[32, values] rows and columns of a lane's values, given as functions of the value's number."""
    return (
        np.stack([np.broadcast_to(row(i), 32) for i in range(values)], 1),
        np.stack([np.broadcast_to(column(i), 32) for i in range(values)], 1),
    )


# The PTX manual's figures: (rows, columns) of A [16, k], B [k, 8] and C [16, 8] that each lane holds.
A_16 = {
    16: _places(8, lambda i: GROUP + i // 2 % 2 * 8, lambda i: MEMBER * 2 + i % 2 + i // 4 * 8),
    8: _places(4, lambda i: GROUP + i // 2 * 8, lambda i: MEMBER * 2 + i % 2),
}
B_16 = {
    16: _places(4, lambda i: MEMBER * 2 + i % 2 + i // 2 * 8, lambda i: GROUP),
    8: _places(2, lambda i: MEMBER * 2 + i, lambda i: GROUP),
}
A_TF32 = {
    8: _places(4, lambda i: GROUP + i % 2 * 8, lambda i: MEMBER + i // 2 * 4),
    4: _places(2, lambda i: GROUP + i * 8, lambda i: MEMBER),
}
B_TF32 = {8: _places(2, lambda i: MEMBER + i * 4, lambda i: GROUP), 4: _places(1, lambda i: MEMBER, lambda i: GROUP)}
C = _places(4, lambda i: GROUP + i // 2 * 8, lambda i: MEMBER * 2 + i % 2)


def require_whole_warp(warp, lanes, instruction):
    if not lanes.all():
        raise PtxError(f"not all 32 lanes of warp {warp.index} take part in {instruction.text}")


@decodes("mma")
def _multiply(kernel, instruction):
    """mma.sync.aligned.m16n8kK.row.col.f32.type.type.f32: sums in fp32, products exact."""
    shape, type_ = instruction.opcode[3], instruction.opcode[-2]
    if shape[:6] != "m16n8k" or instruction.opcode[-1] != "f32" or type_ not in ("bf16", "f16", "tf32"):
        raise PtxError(f"matrix product not modelled: {instruction.text}")
    k = int(shape[6:])
    places_a, places_b = (A_TF32[k], B_TF32[k]) if type_ == "tf32" else (A_16[k], B_16[k])
    d, a, b, c = (elements(operand) for operand in instruction.operands)
    read_a, read_b = ([reader(kernel, one, "b32") for one in operand] for operand in (a, b))
    read_c = [reader(kernel, one, "f32") for one in c]
    put = [writer(kernel, one) for one in d]

    def matrix(warp, readers, places, shape):
        words = np.stack([read(warp) for read in readers], 1)
        if type_ == "tf32":  # the low 13 bits are not looked at
            values = (words & np.uint32(0xFFFFE000)).view(np.float32)
        else:
            values = numbers(words.view(np.uint16), type_)
        whole = np.zeros(shape)
        whole[places] = values
        return whole

    def action(warp, lanes):
        require_whole_warp(warp, lanes, instruction)
        product = matrix(warp, read_a, places_a, (16, k)) @ matrix(warp, read_b, places_b, (k, 8))
        sums = product[C] + np.stack([read(warp) for read in read_c], 1)
        for i, write in enumerate(put):
            write(warp, lanes, sums[:, i].astype(np.float32))

    return action


@decodes("ldmatrix")
def _load_matrix(kernel, instruction):
    """ldmatrix.sync.aligned.m8n8.xN[.trans].shared.b16: lanes 8j to 8j+7 hold the addresses of matrix j's rows."""
    transposed = "trans" in instruction.opcode
    puts = [writer(kernel, one) for one in elements(instruction.operands[0])]
    where = addresses(kernel, instruction.operands[1])
    row, column = (
        (2 * MEMBER[:, None] + [0, 1], GROUP[:, None])
        if transposed
        else (
            GROUP[:, None],
            2 * MEMBER[:, None] + [0, 1],
        )
    )

    def action(warp, lanes):
        require_whole_warp(warp, lanes, instruction)
        at = where(warp)[: 8 * len(puts)]
        shared = warp.block.shared
        rows = shared.load(at, 16, warp.index)
        shared.count(instruction.index, instruction.text, at, 16, LANES[: at.size])
        matrices = rows.view(np.uint16).reshape(len(puts), 8, 8)
        for matrix, put in zip(matrices, puts, strict=True):
            put(warp, lanes, np.ascontiguousarray(matrix[row, column]).view(np.uint32)[:, 0])

    return action


@decodes("shfl")
def _shuffle(kernel, instruction):
    """shfl.sync.mode.b32 d[|p], a, b, c, members; whole warps only (c = 31 or 0 for up)."""
    mode = instruction.opcode[2]
    target, *predicate = instruction.operands[0].split("|")
    put = writer(kernel, target)
    put_inside = writer(kernel, predicate[0]) if predicate else None
    value, by = (reader(kernel, one, "b32") for one in instruction.operands[1:3])
    limit, whole = reader(kernel, instruction.operands[3], "b32"), 0 if mode == "up" else 31

    def action(warp, lanes):
        if (limit(warp)[lanes] != whole).any():
            raise PtxError(f"shuffle of a part of a warp, not modelled: {instruction.text}")
        by_lane = by(warp).astype(np.int64)
        source = {
            "bfly": lambda: LANES ^ by_lane,
            "idx": lambda: by_lane & 31,
            "down": lambda: LANES + by_lane,
            "up": lambda: LANES - by_lane,
        }[mode]()
        inside = (source >= 0) & (source < 32)
        source = np.where(inside, source, LANES)
        if not lanes[source[lanes]].all():
            raise PtxError(f"shuffle from a lane that takes no part: {instruction.text}")
        put(warp, lanes, value(warp)[source])
        if put_inside:
            put_inside(warp, lanes, inside)

    return action


@decodes("vote")
def _vote(kernel, instruction):
    """vote.sync.mode d, p, members"""
    mode = instruction.opcode[2]
    put = writer(kernel, instruction.operands[0])
    read = reader(kernel, instruction.operands[1], "pred")

    def action(warp, lanes):
        votes = read(warp) & lanes
        if mode == "ballot":
            put(warp, lanes, np.full(32, np.sum(votes.astype(np.uint64) << LANES.astype(np.uint64)), np.uint32))
        else:
            put(warp, lanes, np.full(32, {"any": votes.any(), "all": (votes == lanes).all()}[mode]))

    return action
