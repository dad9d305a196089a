"""Triton's interpreter, hardened: what a GPU would refuse or get wrong, it refuses too.

As it comes, the interpreter multiplies bf16 as integers, rounds fp32 to bf16 by cutting bits off, sees no access out of
bounds, and runs the programs of a launch in order, so that no race between them shows. `install()` mends all four; it
needs TRITON_INTERPRET=1 in the environment before triton is imported.
"""

import random
import types
from contextlib import contextmanager

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder, Grid = interpreter.InterpreterBuilder, interpreter.GridExecutor


class OutOfBoundsError(IndexError):
    """A program touched memory that the launch did not get."""


class RaceError(RuntimeError):
    """Two programs, or two lanes of one store, touched the same address, one of them writing."""


class Launch:
    """The one that runs: the memory it may touch, and who touched what so far."""

    def __init__(self, tensors):
        self.ranges = [(name, t.data_ptr(), t.data_ptr() + _extent(t)) for name, t in tensors if t.numel()]
        self.readers, self.writers = {}, {}

    def load(self, addresses, size, program):
        self._check(addresses, size, program, "load")
        for address in addresses:
            self._refuse_other(self.writers.get(address, program), program, address)
            # A second reader stands for all: whoever writes later is another than one of the two.
            first = self.readers.setdefault(address, program)
            if first != program:
                self.readers[address] = "several programs"

    def store(self, addresses, size, program):
        self._check(addresses, size, program, "store")
        if len(set(addresses)) < len(addresses):
            raise RaceError(f"two lanes of one store in program {program} write the same address")
        for address in addresses:
            self._refuse_other(self.writers.get(address, program), program, address)
            self._refuse_other(self.readers.get(address, program), program, address)
            self.writers[address] = program

    def _check(self, addresses, size, program, what):
        at = np.asarray(addresses, np.int64)
        inside = np.zeros(at.shape, bool)
        for _, first, end in self.ranges:
            inside |= (at >= first) & (at + size <= end)
        if not inside.all():
            bad = int(at[~inside][0])
            name, first, end = min(self.ranges, key=lambda r: min(abs(bad - r[1]), abs(bad - r[2])))
            raise OutOfBoundsError(
                f"{what} in program {program}: {np.count_nonzero(~inside)} elements out of bounds, "
                f"the first at byte {bad - first} of {name}, which has {end - first}"
            )

    @staticmethod
    def _refuse_other(other, program, address):
        if other != program:
            raise RaceError(f"programs {other} and {program} both touch address {address:#x}, and one writes")


class State:
    """What the hardened interpreter goes by."""

    launch = None
    allowed = ()  # tensors that programs reach by addresses in memory, not as arguments
    order = random.Random(0)
    launches = 0


@contextmanager
def allow(*tensors):
    """Within, programs may also touch these tensors, whose addresses they read from a table."""
    State.allowed = tensors
    try:
        yield
    finally:
        State.allowed = ()


def install(seed=0):
    """Harden the interpreter of this process; programs of a launch run in an order drawn from the seed."""
    State.order = random.Random(seed)
    Builder.create_dot = _exact_dot(Builder.create_dot)
    Builder.cast_impl = _rounding_cast(Builder.cast_impl)
    Builder.create_masked_load = _watched_load(Builder.create_masked_load)
    Builder.create_masked_store = _watched_store(Builder.create_masked_store)
    Grid._init_args_hst = _registering(Grid._init_args_hst)
    call = Grid.__call__
    # Only the loops over the grid see this `range`.
    names = {**call.__globals__, "range": _shuffled}
    Grid.__call__ = types.FunctionType(call.__code__, names, "__call__", call.__defaults__, call.__closure__)
    for atomic in ("create_atomic_rmw", "create_atomic_cas"):
        setattr(Builder, atomic, _refused)


def _refused(self, *_):
    raise RaceError("an atomic: sums would depend on the order of programs")


def _exact_dot(dot):
    def create_dot(self, a, b, total, *rest):
        return dot(self, _widened(a), _widened(b), total, *rest)

    return create_dot


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounding_cast(cast):
    def cast_impl(self, source, target):
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, source, target)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return interpreter.TensorHandle(np.where(np.isnan(source.data), np.uint16(0x7FFF), rounded), target.scalar)

    return cast_impl


def _watched_load(load):
    def create_masked_load(self, pointers, mask, *rest):
        State.launch.load(*_touched(pointers, mask), self.grid_idx)
        return load(self, pointers, mask, *rest)

    return create_masked_load


def _watched_store(store):
    def create_masked_store(self, pointers, value, mask, *rest):
        State.launch.store(*_touched(pointers, mask), self.grid_idx)
        return store(self, pointers, value, mask, *rest)

    return create_masked_store


def _touched(pointers, mask):
    """The addresses of the lanes that the mask lets through, and the size of an element."""
    addresses = np.asarray(pointers.data).astype(np.int64).ravel()
    if mask is not None:
        addresses = addresses[np.broadcast_to(mask.data, pointers.data.shape).ravel().astype(bool)]
    return addresses.tolist(), max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _registering(init):
    def init_args(self, args, kwargs):
        args, kwargs = init(self, args, kwargs)
        named = [*zip(self.arg_names, args, strict=False), *kwargs.items()]
        named += [(f"tensor {i} of those allowed", tensor) for i, tensor in enumerate(State.allowed)]
        State.launch = Launch([(name, value) for name, value in named if hasattr(value, "data_ptr")])
        State.launches += 1
        return args, kwargs

    return init_args


def _extent(tensor):
    """Bytes from the first element to the end of the last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * step for size, step in steps) + 1) * tensor.element_size()


def _shuffled(*bounds):
    order = list(range(*bounds))
    State.order.shuffle(order)
    return order
