"""Instructions that move data: parameters, global and shared memory, asynchronous copies."""

import numpy as np
from ptx.arithmetic import decodes
from ptx.errors import PtxError
from ptx.operands import addresses, elements, reader, writer
from ptx.parse import PARAMETER_BASE, SHARED_END
from ptx.values import LANES, TYPES, size_of


@decodes("ld", "ldu")
def _load(kernel, instruction):
    if "param" in instruction.opcode:
        return _load_parameter(kernel, instruction)
    _refuse_local(instruction)
    type_ = instruction.opcode[-1]
    puts = [writer(kernel, one) for one in elements(instruction.operands[0])]
    where = addresses(kernel, instruction.operands[1])
    wanted = TYPES[type_]
    size = size_of(type_) * len(puts)

    def action(warp, lanes):
        at = where(warp)[lanes]
        values = np.zeros((32, size), np.uint8)
        values[lanes] = read(warp, instruction, at, size, LANES[lanes])
        for put, value in zip(puts, values.view(wanted).T, strict=True):
            put(warp, lanes, value)

    return action


def _load_parameter(kernel, instruction):
    type_ = instruction.opcode[-1]
    puts = [writer(kernel, one) for one in elements(instruction.operands[0])]
    where = addresses(kernel, instruction.operands[1])
    size = size_of(type_) * len(puts)

    def action(warp, lanes):
        arguments = np.frombuffer(warp.block.arguments, np.uint8)
        at = np.where(lanes, where(warp).astype(np.int64) - PARAMETER_BASE, 0)
        if ((at < 0) | (at + size > arguments.size)).any():
            raise PtxError(f"outside the kernel's parameters: {instruction.text}")
        values = arguments[at[:, None] + np.arange(size)]
        for put, value in zip(puts, values.view(TYPES[type_]).T, strict=True):
            put(warp, lanes, value)

    return action


@decodes("st")
def _store(kernel, instruction):
    _refuse_local(instruction)
    type_ = instruction.opcode[-1]
    where = addresses(kernel, instruction.operands[0])
    get = [reader(kernel, one, type_) for one in elements(instruction.operands[1])]

    def action(warp, lanes):
        values = np.stack([one(warp)[lanes] for one in get], 1)
        write(warp, instruction, where(warp)[lanes], np.ascontiguousarray(values).view(np.uint8), LANES[lanes])

    return action


def _refuse_local(instruction):
    if "local" in instruction.opcode or "const" in instruction.opcode:
        raise PtxError(f"local and constant memory are not modelled: {instruction.text}")


def _is_shared(instruction, at):
    return "shared" in instruction.opcode or ("global" not in instruction.opcode and int(at[0]) < SHARED_END)


def read(warp, instruction, at, size, lanes):
    """``at`` holds the addresses of ``lanes``."""
    block = warp.block
    if _is_shared(instruction, at):
        values = block.shared.load(at, size, warp.index)
        block.shared.count(instruction.index, instruction.text, at, size, lanes)
    else:
        values = block.memory.load(at, size, block.index)
        block.memory.count(instruction.index, instruction.text, at, size)
    return values


def write(warp, instruction, at, values, lanes):
    block = warp.block
    if _is_shared(instruction, at):
        block.shared.store(at, values, warp.index)
        block.shared.count(instruction.index, instruction.text, at, values.shape[1], lanes)
    else:
        block.memory.store(at, values, block.index)
        block.memory.count(instruction.index, instruction.text, at, values.shape[1])


@decodes("isspacep")
def _is_in(kernel, instruction):
    """isspacep.shared or .global p, address"""
    shared = {"shared": True, "global": False}[instruction.opcode[1]]
    put = writer(kernel, instruction.operands[0])
    where = reader(kernel, instruction.operands[1], "u64")
    return lambda warp, lanes: put(warp, lanes, (where(warp) < SHARED_END) == shared)


@decodes("cp")
def _copy(kernel, instruction):
    kinds = {"cg": _start_copy, "ca": _start_copy, "commit_group": _commit, "wait_group": _wait, "wait_all": _wait}
    if instruction.opcode[1] != "async" or instruction.opcode[2] not in kinds:
        raise PtxError(f"not modelled: {instruction.text}")
    return kinds[instruction.opcode[2]](kernel, instruction)


def _start_copy(kernel, instruction):
    """cp.async [shared], [global], size[, bytes from global]; the rest becomes zero."""
    target, source = (addresses(kernel, one) for one in instruction.operands[:2])
    size = int(instruction.operands[2], 0)
    given = reader(kernel, instruction.operands[3], "u32") if len(instruction.operands) > 3 else None

    def action(warp, lanes):
        block = warp.block
        to, start = target(warp)[lanes], source(warp)[lanes]
        count = given(warp)[lanes] if given else np.full(to.size, size)
        if not np.isin(count, (0, size)).all():
            raise PtxError("a part of a cp.async from global memory is not modelled")
        whole = count == size
        values = np.zeros((to.size, size), np.uint8)
        if whole.any():
            values[whole] = block.memory.load(start[whole], size, block.index)
            block.memory.count(instruction.index, instruction.text, start[whole], size)
        block.shared.start_copy(to, size, warp.index)
        block.shared.count(instruction.index, instruction.text, to, size, LANES[lanes])
        warp.copies.append((to, values))

    return action


def _commit(kernel, instruction):
    def action(warp, lanes):
        warp.groups.append(warp.copies)
        warp.copies = []

    return action


def _wait(kernel, instruction):
    everything = instruction.opcode[2] == "wait_all"
    left = 0 if everything else int(instruction.operands[0], 0)

    def action(warp, lanes):
        if everything:
            warp.groups.append(warp.copies)
            warp.copies = []
        while len(warp.groups) > left:
            for to, values in warp.groups.pop(0):
                warp.block.shared.finish_copy(to, values, warp.index)

    return action


@decodes("membar", "fence", "griddepcontrol", "prefetch")
def _nothing(kernel, instruction):
    """Ordering and hints: lanes run in order here, and blocks see each other's stores at once."""
    return lambda warp, lanes: None
