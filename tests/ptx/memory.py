"""Global and shared memory that refuse what a GPU would fault on or leave undefined, and count what is moved.

Addresses are absolute: a global buffer is host memory at its own address, shared memory begins at SHARED_BASE.
Values travel as bytes, [lanes, size].
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from ptx.errors import PtxError
from ptx.parse import SHARED_BASE

NOBODY, SEVERAL = -1, -2
SECTOR = 32  # bytes that DRAM and the second-level cache move at a time
BANKS = 32  # of shared memory, each 4 bytes wide


@dataclass
class Access:
    """What one instruction did over a whole launch."""

    text: str
    executions: int = 0
    requested: int = 0  # bytes asked for by all lanes
    transactions: int = 0  # 32-byte sectors in global memory, passes over the banks in shared memory
    fewest: int = 0  # transactions that the same bytes need at least

    def add(self, requested: int, transactions: int, fewest: int) -> None:
        self.executions += 1
        self.requested += requested
        self.transactions += transactions
        self.fewest += fewest


class Buffer:
    """A piece of global memory: exact bounds, and who read and wrote each byte."""

    def __init__(self, name: str, array: np.ndarray):
        self.name = name
        self.bytes = array.reshape(-1).view(np.uint8)
        self.start = array.ctypes.data
        self.end = self.start + self.bytes.size
        self.writer = np.full(self.bytes.size, NOBODY, np.int32)
        self.reader = np.full(self.bytes.size, NOBODY, np.int32)
        self._requested: Counter[tuple[str, int]] = Counter()  # bytes by kind and by the size of a lane's access

    def request(self, kind: str, size: int, lanes: int) -> None:
        self._requested[kind, size] += size * lanes

    def requested(self, kind: str, size: int = 0) -> int:
        """Bytes that lanes asked for to "read" or "write"; in accesses of that size, if given."""
        return sum(count for (of, each), count in self._requested.items() if of == kind and size in (0, each))

    def unique(self, kind: str) -> int:
        """Bytes that were read, or written, at least once."""
        return int(np.count_nonzero((self.reader if kind == "read" else self.writer) != NOBODY))


class GlobalMemory:
    """Blocks run at the same time on a GPU: no byte that one writes may be read or written by another."""

    def __init__(self, buffers: dict[str, np.ndarray]):
        self.buffers = {name: Buffer(name, array) for name, array in buffers.items()}
        self.accesses: dict[int, Access] = {}

    def load(self, addresses: np.ndarray, size: int, block: int) -> np.ndarray:
        values = np.empty((addresses.size, size), np.uint8)
        for buffer, lanes, at in self._pieces(addresses, size):
            self._check_race(buffer, at, block, buffer.writer)
            readers = buffer.reader[at]
            buffer.reader[at] = np.where((readers == NOBODY) | (readers == block), block, SEVERAL)
            buffer.request("read", size, lanes.size)
            values[lanes] = buffer.bytes[at]
        return values

    def store(self, addresses: np.ndarray, values: np.ndarray, block: int) -> None:
        for buffer, lanes, at in self._pieces(addresses, values.shape[1]):
            self._check_race(buffer, at, block, buffer.writer)
            self._check_race(buffer, at, block, buffer.reader)
            buffer.writer[at] = block
            buffer.request("write", values.shape[1], lanes.size)
            buffer.bytes[at] = values[lanes]

    def count(self, index: int, text: str, addresses: np.ndarray, size: int) -> None:
        distinct = set(addresses.tolist())
        sectors = {address // SECTOR for address in distinct}
        access = self.accesses.setdefault(index, Access(text))
        access.add(addresses.size * size, len(sectors), -(-len(distinct) * size // SECTOR))

    def _pieces(self, addresses: np.ndarray, size: int):
        """(buffer, lanes, byte offsets [lanes, size]) for each buffer that the addresses lie in."""
        check_alignment(addresses, size, "global")
        signed = addresses.astype(np.int64)
        left = np.arange(addresses.size)
        while left.size:
            buffer = self._find(int(signed[left[0]]), size)
            inside = (signed[left] >= buffer.start) & (signed[left] + size <= buffer.end)
            lanes = left[inside]
            yield buffer, lanes, (signed[lanes] - buffer.start)[:, None] + np.arange(size)
            left = left[~inside]

    def _find(self, address: int, size: int) -> Buffer:
        for buffer in self.buffers.values():
            if buffer.start <= address and address + size <= buffer.end:
                return buffer
        nearest = min(self.buffers.values(), key=lambda b: min(abs(address - b.start), abs(address - b.end)))
        raise PtxError(
            f"out of bounds in global memory: {size} bytes at offset {address - nearest.start} of "
            f"'{nearest.name}', which has {nearest.bytes.size}"
        )

    @staticmethod
    def _check_race(buffer: Buffer, at: np.ndarray, block: int, others: np.ndarray) -> None:
        other = others[at]
        bad = (other != NOBODY) & (other != block)
        if bad.any():
            raise PtxError(
                f"race in global memory: byte {int(at[bad][0])} of '{buffer.name}', "
                f"block {block} and block {'several' if other[bad][0] == SEVERAL else int(other[bad][0])}"
            )


@dataclass
class SharedMemory:
    """Of one block. Between two barriers no warp may touch what another one writes there.

    A store of the value that is there already is no race: Triton's replicated layouts do that.
    """

    size: int
    accesses: dict[int, Access]
    epoch: int = 0  # barriers so far
    bytes: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.bytes = np.full(self.size, 0xFF, np.uint8)  # NaN in every floating-point type
        self.writer, self.reader = (np.full(self.size, NOBODY, np.int32) for _ in range(2))
        self.written, self.read = (np.full(self.size, -1, np.int32) for _ in range(2))  # the epoch
        self.in_flight = np.zeros(self.size, np.int32)  # asynchronous copies that have not been waited for

    def load(self, addresses: np.ndarray, size: int, warp: int) -> np.ndarray:
        at = self.offsets(addresses, size)
        self._check_race(at, warp, (self.written[at] == self.epoch) & (self.writer[at] != warp), self.writer)
        if (flying := self.in_flight[at] > 0).any():
            raise PtxError(f"shared memory read while a cp.async to it is in flight: offset {int(at[flying][0])}")
        several = (self.read[at] == self.epoch) & (self.reader[at] != warp)
        self.reader[at] = np.where(several, SEVERAL, warp)
        self.read[at] = self.epoch
        return self.bytes[at]

    def store(self, addresses: np.ndarray, values: np.ndarray, warp: int) -> None:
        at = self.offsets(addresses, values.shape[1])
        if (flying := self.in_flight[at] > 0).any():
            raise PtxError(f"shared memory written while a cp.async to it is in flight: offset {int(at[flying][0])}")
        self._write(at, values, warp)

    def _write(self, at: np.ndarray, values: np.ndarray, warp: int) -> None:
        differs = self.bytes[at] != values
        for epochs, others in ((self.written, self.writer), (self.read, self.reader)):
            self._check_race(at, warp, (epochs[at] == self.epoch) & (others[at] != warp) & differs, others)
        self.writer[at] = warp
        self.written[at] = self.epoch
        self.bytes[at] = values

    def start_copy(self, addresses: np.ndarray, size: int, warp: int) -> None:
        """The bytes of an asynchronous copy may land at any time from now on."""
        self.store(addresses, np.full((addresses.size, size), 0xFF, np.uint8), warp)
        np.add.at(self.in_flight, self.offsets(addresses, size), 1)

    def finish_copy(self, addresses: np.ndarray, values: np.ndarray, warp: int) -> None:
        at = self.offsets(addresses, values.shape[1])
        self._write(at, values, warp)
        np.subtract.at(self.in_flight, at, 1)

    def count(self, index: int, text: str, addresses: np.ndarray, size: int, lanes: np.ndarray) -> None:
        """``lanes`` of the warp take part; a pass serves 32 lanes of 4 bytes, 16 of 8 or 8 of 16."""
        passes, fewest = 0, 0
        together = min(32, 128 // size)
        for group in np.unique(lanes // together):
            first = addresses[lanes // together == group].astype(np.int64) // 4
            words = np.unique(first[:, None] + np.arange(max(1, size // 4)))
            passes += int(np.bincount(words % BANKS).max())
            fewest += -(-words.size // BANKS)
        self.accesses.setdefault(index, Access(text)).add(addresses.size * size, passes, fewest)

    def offsets(self, addresses: np.ndarray, size: int) -> np.ndarray:
        check_alignment(addresses, size, "shared")
        start = addresses.astype(np.int64) - SHARED_BASE
        if ((start < 0) | (start + size > self.size)).any():
            bad = start[(start < 0) | (start + size > self.size)][0]
            raise PtxError(f"out of bounds in shared memory: {size} bytes at offset {int(bad)} of {self.size}")
        return start[:, None] + np.arange(size)

    def _check_race(self, at: np.ndarray, warp: int, bad: np.ndarray, others: np.ndarray) -> None:
        if bad.any():
            other = int(others[at][bad][0])
            raise PtxError(
                f"race in shared memory: offset {int(at[bad][0])}, warp {warp} and warp "
                f"{'several' if other == SEVERAL else other}, with no barrier between them"
            )


def check_alignment(addresses: np.ndarray, size: int, space: str) -> None:
    if (addresses % np.uint64(size)).any():
        raise PtxError(f"misaligned access to {space} memory: {size} bytes at {int(addresses[0]):#x}")
