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


NOBODY, SEVERAL = -1, -2  # in the place of a program's number


class Launch:
    """The one that runs: the memory it may touch, and which program read and wrote each byte's element so far."""

    def __init__(self, tensors):
        self.tensors = [(name, t.data_ptr(), t.data_ptr() + _extent(t)) for name, t in tensors if t.numel()]
        spans = _united([span for _, t in tensors if t.numel() for span in _spans(t)])
        self.firsts = np.array([first for first, _ in spans], np.int64)
        self.ends = np.array([end for _, end in spans], np.int64)
        self.offsets = np.concatenate([[0], (self.ends - self.firsts).cumsum()]).astype(np.int64)
        self.readers = np.full(self.offsets[-1], NOBODY, np.int32)
        self.writers = self.readers.copy()

    def load(self, addresses, size, program):
        at = self._places(addresses, size, program, "load")
        self._refuse_others(self.writers[at], program, addresses)
        before = self.readers[at]
        self.readers[at] = np.where((before == NOBODY) | (before == program), program, SEVERAL)

    def store(self, addresses, size, program):
        at = self._places(addresses, size, program, "store")
        if len(np.unique(at)) < len(at):
            raise RaceError(f"two lanes of one store in program {program} write the same address")
        self._refuse_others(self.writers[at], program, addresses)
        self._refuse_others(self.readers[at], program, addresses)
        self.writers[at] = program

    def _places(self, addresses, size, program, what):
        """Where these addresses stand in the log."""
        if not len(addresses):
            return addresses
        span = np.searchsorted(self.firsts, addresses, "right") - 1
        inside = (
            (span >= 0) & (addresses + size <= self.ends[span]) if len(self.ends) else np.zeros(len(addresses), bool)
        )
        if not inside.all():
            self._refuse_outside(addresses[~inside], program, what)
        return self.offsets[span] + addresses - self.firsts[span]

    def _refuse_outside(self, addresses, program, what):
        bad = int(addresses[0])
        near = min(self.tensors, key=lambda tensor: min(abs(bad - tensor[1]), abs(bad - tensor[2])), default=None)
        where = f"at byte {bad - near[1]} of {near[0]}, which has {near[2] - near[1]}" if near else f"at {bad:#x}"
        raise OutOfBoundsError(
            f"{what} in program {program}: {len(addresses)} elements out of bounds, the first {where}"
        )

    @staticmethod
    def _refuse_others(programs, program, addresses):
        wrong = (programs != NOBODY) & (programs != program)
        if wrong.any():
            other, address = programs[wrong][0], int(addresses[wrong][0])
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
        State.launch.load(*_touched(pointers, mask), _number(self))
        return load(self, pointers, mask, *rest)

    return create_masked_load


def _watched_store(store):
    def create_masked_store(self, pointers, value, mask, *rest):
        State.launch.store(*_touched(pointers, mask), _number(self))
        return store(self, pointers, value, mask, *rest)

    return create_masked_store


def _number(builder):
    """Of the program that runs."""
    (x, y, z), (width, height, _) = builder.grid_idx, builder.grid_dim
    return x + width * (y + height * z)


def _touched(pointers, mask):
    """The addresses of the lanes that the mask lets through, and the size of an element."""
    addresses = np.asarray(pointers.data).astype(np.int64).ravel()
    if mask is not None:
        addresses = addresses[np.broadcast_to(mask.data, pointers.data.shape).ravel().astype(bool)]
    return addresses, max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _registering(init):
    def init_args(self, args, kwargs):
        args, kwargs = init(self, args, kwargs)
        named = [*zip(self.arg_names, args, strict=False), *kwargs.items()]
        named += [(f"tensor {i} of those allowed", tensor) for i, tensor in enumerate(State.allowed)]
        State.launch = Launch([(name, value) for name, value in named if hasattr(value, "data_ptr")])
        State.launches += 1
        return args, kwargs

    return init_args


def _united(spans):
    """Spans that overlap as one, in order: two arguments may share memory."""
    result = []
    for first, end in sorted(spans):
        if result and first < result[-1][1]:
            result[-1][1] = max(end, result[-1][1])
        else:
            result.append([first, end])
    return result


def _spans(tensor):
    """First and last byte's end of what a program may touch: of each row, where a matrix's rows lie apart."""
    start, size = tensor.data_ptr(), tensor.element_size()
    if tensor.dim() != 2 or tensor.stride(1) != 1 or tensor.stride(0) <= tensor.shape[1]:
        return [[start, start + _extent(tensor)]]
    rows = (start + row * tensor.stride(0) * size for row in range(tensor.shape[0]))
    return [[row, row + tensor.shape[1] * size] for row in rows]


def _extent(tensor):
    """Bytes from the first element to the end of the last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * step for size, step in steps) + 1) * tensor.element_size()


def _shuffled(*bounds):
    order = list(range(*bounds))
    State.order.shuffle(order)
    return order
