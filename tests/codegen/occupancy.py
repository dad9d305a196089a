"""How many blocks of a kernel a multiprocessor holds at once.

NVIDIA's formula (cuda_occupancy.h) from the limits in the CUDA programming guide's table of compute capabilities;
test_occupancy.py holds it against that header.
"""

from dataclasses import dataclass

REGISTERS = 65536  # of a multiprocessor
REGISTER_UNIT = 256  # registers are given to a warp in such units
PARTS = 4  # of a multiprocessor, each with a quarter of the registers
SHARED_UNIT = 128  # bytes
SHARED_RESERVED = 1024  # bytes of every block that the runtime keeps


@dataclass(frozen=True)
class Limits:
    threads: int  # of a multiprocessor
    blocks: int
    shared: int  # bytes of a multiprocessor

    @property
    def shared_of_block(self) -> int:
        return self.shared - SHARED_RESERVED


LIMITS = {
    80: Limits(2048, 32, 164 * 1024),
    86: Limits(1536, 16, 100 * 1024),
    89: Limits(1536, 24, 100 * 1024),
    90: Limits(2048, 32, 228 * 1024),
    100: Limits(2048, 32, 228 * 1024),
    120: Limits(1536, 24, 100 * 1024),
}


def blocks(architecture: int, threads: int, registers: int, shared: int) -> int:
    """Blocks of one multiprocessor; ``registers`` of a thread, ``shared`` bytes of a block."""
    limits = LIMITS[architecture]
    warps = -(-threads // 32)
    of_warp = _rounded(max(registers, 1) * 32, REGISTER_UNIT)
    if shared > limits.shared_of_block or of_warp * _rounded(warps, PARTS) > REGISTERS:
        return 0
    warps_by_registers = REGISTERS // PARTS // of_warp * PARTS
    return min(
        limits.blocks,
        limits.threads // 32 // warps,
        warps_by_registers // warps,
        limits.shared // _rounded(shared + SHARED_RESERVED, SHARED_UNIT),
    )


def warps(architecture: int, threads: int, registers: int, shared: int) -> int:
    """Warps of one multiprocessor."""
    return blocks(architecture, threads, registers, shared) * -(-threads // 32)


def _rounded(value: int, unit: int) -> int:
    return -(-value // unit) * unit
