"""Triton's dropout in Triton's interpreter, hardened; run by test_triton_dropout.py in a process of its own.

As it comes, the interpreter neither sees accesses out of bounds nor rounds fp32 to bf16 as hardware does (to nearest,
ties to even); both are mended here. Each element of the result must be written exactly once.
"""

import os
import sys

os.environ.update(TRITON_INTERPRET="1", LLMBUILDER_BACKEND="triton", TRITON_DEFAULT_FP_FUSION="0")

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from llmbuilder import ops
from llmbuilder.kernels import dropout as kernel
from llmbuilder.ops import reference

Builder = interpreter.InterpreterBuilder


class Guard:
    """Memory that a launch may touch: (first byte, one past the last), and the addresses written so far."""

    ranges: tuple = ()
    written: list = []  # noqa: RUF012 - one process, one log

    @classmethod
    def check(cls, pointers, mask, what):
        addresses = np.asarray(pointers.data).astype(np.int64).ravel()
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, pointers.data.shape).ravel().astype(bool)]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        inside = np.zeros(addresses.shape, bool)
        for first, last in cls.ranges:
            inside |= (addresses >= first) & (addresses + size <= last)
        assert inside.all(), f"{what} out of bounds: {np.count_nonzero(~inside)} elements"
        return addresses.tolist()


def harden():
    load, store, cast = Builder.create_masked_load, Builder.create_masked_store, Builder.cast_impl

    def guarded_load(self, pointers, mask, *rest):
        Guard.check(pointers, mask, "load")
        return load(self, pointers, mask, *rest)

    def guarded_store(self, pointers, value, mask, *rest):
        Guard.written += Guard.check(pointers, mask, "store")
        return store(self, pointers, value, mask, *rest)

    def rounding_cast(self, source, target):
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, source, target)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return interpreter.TensorHandle(np.where(np.isnan(source.data), np.uint16(0x7FFF), rounded), target.scalar)

    Builder.create_masked_load, Builder.create_masked_store = guarded_load, guarded_store
    Builder.cast_impl = rounding_cast


def allow(*tensors):
    Guard.ranges = tuple((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors)
    Guard.written = []


def check_dropout(shape, dtype, threshold, seed, stream):
    x, seed = torch.randn(shape).to(dtype), torch.tensor(seed)
    results = []
    empty_like = torch.empty_like

    def remembered(like):
        results.append(empty_like(like).fill_(torch.nan))
        allow(x, seed, results[-1])
        return results[-1]

    kernel.torch.empty_like = remembered
    y = kernel.dropout(x, threshold, seed, stream)
    kernel.torch.empty_like = empty_like
    assert torch.equal(y, reference.dropout(x, threshold, seed, stream)), f"{shape} {dtype} differs"
    first, size = y.data_ptr(), y.element_size()
    assert sorted(Guard.written) == [first + i * size for i in range(y.numel())], "not each element once"


def check_public(shape):
    """Through the registry, with the gradient."""
    Guard.check = classmethod(lambda cls, *_: [])
    x, seed = torch.randn(shape, requires_grad=True), torch.tensor(-123456789012345)
    keep = ops.dropout_mask(shape, 0.3, seed, 7)
    assert torch.equal(keep, reference.keep_mask(shape, int(65536 * 0.3 + 0.5), seed, 7))
    y = ops.dropout(x, 0.3, seed, 7)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(gradient != 0, keep)
    assert torch.equal(y != 0, keep)


@triton.jit
def unmasked(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at))


def check_the_guard():
    """It must see a tail that nobody masks, or the checks above prove nothing."""
    x, y = torch.ones(7), torch.ones(7)
    allow(x, y)
    try:
        unmasked[(1,)](x, y, 7, BLOCK=8)
    except Exception as error:
        assert "load out of bounds: 1 elements" in str(error.__cause__ or error), error
    else:
        sys.exit("the guard saw no access out of bounds")


harden()
check_the_guard()
for shape in [(1,), (3, 37), (5, 513), (2, 3, 8), (9, 1), (0, 4)]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_dropout(shape, dtype, 19661, -5, 2**32 - 1)
for threshold, seed, stream in [(1, 2**62, 0), (65535, 0, 1), (32768, -(2**63), 2**31), (0, 1, 1)]:
    check_dropout((4, 70), torch.float32, threshold, seed, stream)
check_public((5, 3, 41))
print("all equal")
