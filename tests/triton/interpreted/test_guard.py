"""The hardened interpreter must see what it is there for, or the other tests prove nothing."""

import guard
import pytest
import torch
import triton
import triton.language as tl


def refused(kernel, grid, *arguments, **meta):
    """What the launch is refused with, wherever in the chain of errors it stands."""
    with pytest.raises(Exception) as caught:
        kernel[grid](*arguments, **meta)
    error = caught.value
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, at < n, other=0.0), at < n)


@triton.jit
def load_without_a_mask(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at), at < n)


@triton.jit
def store_without_a_mask(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, at < n, other=0.0))


@triton.jit
def load_before_the_start(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at - 1, at < n, other=0.0), at < n)


def test_a_right_kernel_passes():
    x, y = torch.randn(7), torch.empty(7)
    copy[(2,)](x, y, 7, BLOCK=4)
    assert torch.equal(x, y)


@pytest.mark.parametrize("kernel", [load_without_a_mask, store_without_a_mask, load_before_the_start])
def test_out_of_bounds(kernel):
    error = refused(kernel, (2,), torch.ones(7), torch.ones(7), 7, BLOCK=4)
    assert isinstance(error, guard.OutOfBoundsError) and "1 elements out of bounds" in str(error)


@triton.jit
def load_beside_a_row(x, y, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)))


def test_between_rows_that_lie_apart_is_out_of_bounds():
    error = refused(load_beside_a_row, (1,), torch.ones(2, 5)[:, :3], torch.empty(4), BLOCK=4)
    assert isinstance(error, guard.OutOfBoundsError) and "1 elements out of bounds" in str(error)


@triton.jit
def through_a_table(table, y, BLOCK: tl.constexpr):
    x = tl.load(table).to(tl.pointer_type(tl.float32))
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at))


def test_addresses_from_memory_are_out_of_bounds_until_allowed():
    x, y = torch.randn(4), torch.empty(4)
    table = torch.tensor([x.data_ptr()])
    assert isinstance(refused(through_a_table, (1,), table, y, BLOCK=4), guard.OutOfBoundsError)
    with guard.allow(x):
        through_a_table[(1,)](table, y, BLOCK=4)
    assert torch.equal(x, y)


@triton.jit
def everybody_adds(y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(y + at) + 1)


@triton.jit
def everybody_writes(y, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK), tl.arange(0, BLOCK).to(tl.float32))


@triton.jit
def one_writes_what_others_read(y, z, BLOCK: tl.constexpr):
    program, at = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(z + program * BLOCK + at, tl.load(y + at))
    if program == 1:
        tl.store(y + at, tl.zeros((BLOCK,), tl.float32))


@triton.jit
def lanes_collide(y, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK) // 2, tl.arange(0, BLOCK).to(tl.float32))


@triton.jit
def atomic_sum(y, BLOCK: tl.constexpr):
    tl.atomic_add(y + tl.arange(0, BLOCK), 1.0)


def test_races():
    y, z = torch.zeros(4), torch.zeros(16)
    for kernel, arguments in [
        (everybody_adds, (y,)),
        (everybody_writes, (y,)),
        (one_writes_what_others_read, (y, z)),
        (lanes_collide, (y,)),
        (atomic_sum, (y,)),
    ]:
        assert isinstance(refused(kernel, (4,), *arguments, BLOCK=4), guard.RaceError), kernel.__name__


def test_one_program_may_read_what_it_wrote():
    y = torch.zeros(4)
    everybody_adds[(1,)](y, BLOCK=4)
    assert y.tolist() == [1] * 4


@triton.jit
def first_come(order, n, BLOCK: tl.constexpr):
    tl.store(order + tl.program_id(0), tl.program_id(0))


def test_programs_run_in_a_drawn_order():
    seen = []
    store = guard.Launch.store
    try:
        guard.Launch.store = lambda self, at, size, program: seen.append(program) or store(self, at, size, program)
        first_come[(20,)](torch.zeros(20, dtype=torch.int32), 20, BLOCK=1)
    finally:
        guard.Launch.store = store
    assert sorted(seen) == list(range(20)) and seen != list(range(20))


@triton.jit
def products(x, y, z, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(z + at, tl.dot(tl.load(x + at), tl.load(y + at)))


def test_bf16_products():
    x, y, z = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    products[(1,)](x, y, z, BLOCK=16)
    torch.testing.assert_close(z, x.float() @ y.float())


@triton.jit
def round_to_bf16(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at).to(tl.bfloat16))


def test_bf16_rounds_to_nearest_even():
    x = torch.cat([torch.randn(1000), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, torch.nan, torch.inf, 3.4e38, 1e-40])])
    x = torch.nn.functional.pad(x, (0, 1024 - len(x)))
    y = torch.empty(1024, dtype=torch.bfloat16)
    round_to_bf16[(1,)](x, y, BLOCK=1024)
    assert torch.equal(y.nan_to_num(7), x.bfloat16().nan_to_num(7))


def test_memory_that_nobody_wrote_is_not_a_number():
    assert torch.empty(1000).isnan().all() and torch.ones(3).new_empty(50).isnan().all()
    assert torch.empty_like(torch.ones(30, dtype=torch.bfloat16)).isnan().all()
