"""Launches of a kernel: blocks one after the other, their warps interleaved, lanes together until they part.

Where lanes part, those furthest behind go on first, until they meet the others again; compiled code meets again right
after a branch. With a seed the order of blocks and warps is drawn.
"""

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
import ptx.movement
import ptx.tensor  # noqa: F401
from ptx.arithmetic import DECODERS
from ptx.errors import PtxError
from ptx.memory import Access, GlobalMemory, SharedMemory
from ptx.operands import register_raw
from ptx.parse import Kernel
from ptx.values import LANES

SHARED_LIMIT = 163 * 1024  # of a block on sm_80
WITHOUT_OPT_IN = 48 * 1024
MAX_STEPS = 50_000_000  # of one launch


@dataclass
class Counts:
    opcodes: Counter  # opcode -> executions by a warp
    globals: list[Access]
    shared: list[Access]
    memory: GlobalMemory

    def executed(self, *parts: str) -> int:
        """Executions by a warp of opcodes that have all these parts."""
        return sum(n for opcode, n in self.opcodes.items() if set(parts) <= set(opcode.split(".")))

    @property
    def bank_conflicts(self) -> int:
        return sum(access.transactions - access.fewest for access in self.shared)


class Block:
    def __init__(self, launch, index, position):
        self.index, self.position, self.launch = index, position, launch
        self.arguments, self.memory = launch.arguments, launch.memory
        self.shared = SharedMemory(launch.shared_bytes, launch.shared_accesses)


class Warp:
    def __init__(self, block, index):
        self.block, self.index = block, index
        launch = block.launch
        threads = index * 32 + LANES
        self.everyone = np.ones(32, bool)
        self.live = threads < launch.threads
        self.paths = {0: self._shared_mask(self.live)}  # where lanes stand -> which
        self.registers = dict(launch.registers)
        self.waiting = False  # at a barrier
        self.copies, self.groups = [], []  # asynchronous copies: not yet committed, committed
        self._special = self._specials(threads, launch)

    def _specials(self, threads, launch):
        (bx, by, _), position = launch.block, self.block.position
        values = {"%tid.x": threads % bx, "%tid.y": threads // bx % by, "%tid.z": threads // (bx * by)}
        values |= {"%laneid": LANES, "%warpid": self.index}
        for axis, name in enumerate("xyz"):
            values |= {f"%ctaid.{name}": position[axis], f"%nctaid.{name}": launch.grid[axis]}
            values |= {f"%ntid.{name}": launch.block[axis]}
        return {name: np.broadcast_to(np.asarray(value), 32) for name, value in values.items()}

    def special(self, name):
        if name not in self._special:
            raise PtxError(f"special register not modelled: {name}")
        return self._special[name]

    def _shared_mask(self, lanes):
        return self.everyone if lanes.all() else lanes

    def advance(self, steps):
        """At most so many instructions; stops at a barrier. Returns how many were run."""
        left = steps
        while left and self.paths and not self.waiting:
            left -= self._follow(left)
        return steps - left

    def _follow(self, steps):
        """Runs the lanes that are furthest behind until they part, wait, end or meet others."""
        program, counts = self.block.launch.program, self.block.launch.counts
        pc = min(self.paths)
        lanes = self.paths.pop(pc)
        meeting = min(self.paths, default=len(program))
        done = 0
        while pc < meeting and done < steps:
            done += 1
            counts[pc] += 1
            step = program[pc]
            taken = lanes
            if step.guard:
                taken = self._shared_mask(lanes & (self.registers[step.guard] ^ step.negated))
            pc += 1
            if step.target is not None:
                if taken is lanes or (taken == lanes).all():
                    pc = step.target
                elif taken.any():
                    self._join(step.target, taken)
                    lanes = lanes & ~taken
                    break
            elif step.action:
                if taken.any():
                    step.action(self, taken)
            elif step.ends:
                self.live = self.live & ~taken
                lanes = lanes & ~taken
                if not lanes.any():
                    return done
            else:
                self._wait(taken, step.text)
                break
        if pc >= len(program):
            raise PtxError("a warp ran past the end of the kernel")
        self._join(pc, lanes)
        return done

    def _join(self, pc, lanes):
        self.paths[pc] = self._shared_mask(self.paths[pc] | lanes if pc in self.paths else lanes)

    def _wait(self, lanes, text):
        if (lanes != self.live).any():
            raise PtxError(f"only a part of warp {self.index} reaches the barrier: {text}")
        self.waiting = True


class Step:
    """One decoded instruction: a branch to ``target``, an end, an action, or else a barrier."""

    def __init__(self, kernel, instruction):
        opcode = instruction.opcode
        self.text = instruction.text
        self.guard, self.negated = instruction.guard, instruction.guard_negated
        self.target = kernel.labels[instruction.operands[-1]] if opcode[0] == "bra" else None
        self.ends = opcode[0] in ("ret", "exit")
        self.action = None
        if opcode[0] in ("bar", "barrier"):
            if "warp" in opcode:
                self.action = lambda warp, lanes: None  # lanes run together here
            elif "sync" not in opcode or instruction.operands != ("0",):
                raise PtxError(f"barrier not modelled: {self.text}")
        elif self.target is None and not self.ends:
            if opcode[0] not in DECODERS:
                raise PtxError(f"opcode not modelled: {self.text}")
            try:
                self.action = DECODERS[opcode[0]](kernel, instruction)
            except (KeyError, ValueError) as error:
                raise PtxError(f"not understood: {self.text}") from error


class Launch:
    def __init__(self, kernel: Kernel, grid, block, arguments: bytes, memory: GlobalMemory, dynamic_shared: int):
        self.kernel, self.grid, self.block = kernel, grid, block
        self.threads = block[0] * block[1] * block[2]
        self.arguments, self.memory = arguments, memory
        self.registers = {name: np.full(32, 0xCD, register_raw(kernel, name)) for name in kernel.registers}
        self.shared_bytes = kernel.dynamic_start + dynamic_shared if dynamic_shared else kernel.static_shared
        self.shared_accesses: dict[int, Access] = {}
        self.program = [Step(kernel, instruction) for instruction in kernel.instructions]
        self.counts = [0] * len(self.program)
        _check_limits(self, dynamic_shared)

    def run(self, seed: int) -> Counts:
        draw = random.Random(seed) if seed else None
        gx, gy, gz = self.grid
        positions = [(x, y, z) for z in range(gz) for y in range(gy) for x in range(gx)]
        order = list(enumerate(positions))
        if draw:
            draw.shuffle(order)
        for index, position in order:
            self._run_block(Block(self, index, position), draw)
        opcodes = Counter()
        for instruction, count in zip(self.kernel.instructions, self.counts, strict=True):
            opcodes[".".join(instruction.opcode)] += count
        return Counts(opcodes, list(self.memory.accesses.values()), list(self.shared_accesses.values()), self.memory)

    def _run_block(self, block, draw):
        warps = [Warp(block, index) for index in range(-(-self.threads // 32))]
        steps = 0
        while unfinished := [warp for warp in warps if warp.paths]:
            ready = [warp for warp in unfinished if not warp.waiting]
            if ready:
                warp = draw.choice(ready) if draw else ready[0]
                steps += self._advance(warp, draw.randint(1, 200) if draw else MAX_STEPS - steps)
                if steps >= MAX_STEPS:
                    raise PtxError(f"still running after {steps} instructions")
            elif len(unfinished) < len(warps):
                raise PtxError("deadlock: some warps have ended and never reach the barrier at which others wait")
            else:
                for warp in warps:
                    warp.waiting = False
                block.shared.epoch += 1

    def _advance(self, warp, steps):
        try:
            return warp.advance(steps)
        except PtxError as error:
            place = f"{self.kernel.name}, block {warp.block.position}, warp {warp.index}"
            raise PtxError(f"{error} ({place})") from error


def _check_limits(launch, dynamic_shared):
    if launch.shared_bytes > SHARED_LIMIT:
        raise PtxError(f"{launch.shared_bytes} bytes of shared memory; sm_80 has {SHARED_LIMIT} for a block")
    if launch.kernel.static_shared > WITHOUT_OPT_IN:
        raise PtxError(f"{launch.kernel.static_shared} bytes of static shared memory; {WITHOUT_OPT_IN} is the limit")
    if not 0 < launch.threads <= 1024:
        raise PtxError(f"{launch.threads} threads in a block")
    if launch.grid[1] > 65535 or launch.grid[2] > 65535:
        raise PtxError(f"grid {launch.grid}: y and z go to 65,535")


def pack(kernel: Kernel, values) -> bytes:
    """Arguments (numpy scalars, or bytes of a struct) laid out as the kernel reads them."""
    size = max((offset + length for offset, length in kernel.parameters.values()), default=0)
    packed = bytearray(size)
    for (offset, length), value in zip(kernel.parameters.values(), values, strict=True):
        raw = value if isinstance(value, bytes) else np.asarray(value).tobytes()
        if len(raw) != length:
            raise PtxError(f"an argument of {len(raw)} bytes where the kernel takes {length}")
        packed[offset : offset + length] = raw
    return bytes(packed)


def launch(kernel: Kernel, grid, block, arguments, buffers, dynamic_shared: int = 0, seed: int = 0) -> Counts:
    """Runs a kernel on ``buffers`` (name -> numpy array, changed in place). ``arguments``: as ``pack`` takes them."""
    memory = GlobalMemory(buffers)
    with np.errstate(all="ignore"):
        return Launch(kernel, grid, block, pack(kernel, arguments), memory, dynamic_shared).run(seed)
