"""The emulator itself: it sees each bug of probes.cu, passes the same kernel without, and computes what a GPU would."""

import ctypes

import pytest
import torch
from gpusim import sanitize
from gpusim.build import HERE, build, why_not
from gpusim.harness import Emulator, poisoned

SCHEDULES = range(8)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# What the emulator says of the bug. None: it lets the kernel run to its end with a wrong result, NaN or another value.
SEEN = {
    "missing_barrier": None,
    "early_refill": None,
    "lax_wait": None,
    "copy_in_flight": "cp.async under way",
    "divergent_barrier": "divergent __syncthreads()",
    "exit_before_barrier": "although 1 threads have exited",
    "deadlock": "deadlock: 97 threads wait at __syncthreads(), 31 in warp operations",
    "read_out_of_bounds": "out of bounds: thread 127 of block 0 reads 4 bytes from byte 512 of input",
    "write_out_of_bounds": "out of bounds: thread 0 of block 0 writes 4 bytes from byte -4 of output",
    "misaligned": "12 beyond a multiple of 16",
    "misaligned_ldmatrix": "2 beyond a multiple of 16",
    "lost_lane": "from lane 16, which is not in the mask 0000ffff",
    "different_masks": "diverged",
    "mask_without_itself": "with mask 00000001, which excludes it",
    "race_of_blocks": "which another block has touched",
    "sum_of_blocks": "which another block has touched",
    "race_of_warps": "which another warp has touched since the last barrier",
    "shared_write_out_of_bounds": "writes beyond the bounds of shared memory values",
    "shared_access_out_of_bounds": "touches bytes 2048 to 2063 of shared memory DYN_SMEM, which has 2048",
    "unset_shared": None,
    "unrounded_tf32": "is no tf32",
}


# Not seen without a sanitizer. (asan, tsan): what its report says, and nothing where it has none to make.
SANITIZED = {
    "shared_read_out_of_bounds": ("heap-buffer-overflow", ""),
    "missing_barrier": ("", "data race"),
    "early_refill": ("", "data race"),
}


@pytest.fixture(scope="module")
def emulator():
    if reason := why_not():
        pytest.skip(reason)
    return Emulator(build([HERE / "probes.cu"]))


@pytest.fixture(autouse=True)
def clean(emulator):
    yield
    emulator.forget()
    emulator.schedule(0)
    emulator.target(86)
    emulator.recorder.capture(None)


def call(emulator, function, *arguments):
    """What a function of probes.cu says, nothing when all went well; tensors are registered and passed by address."""
    values = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            emulator.register(argument)
            argument = ctypes.c_void_p(argument.data_ptr())
        elif isinstance(argument, int) and not isinstance(argument, bool):
            argument = ctypes.c_uint64(argument)
        values.append(argument)
    function = getattr(emulator.library, function)
    function.restype = ctypes.c_char_p
    message = function(*values)
    return None if message is None else message.decode()


def run_probe(emulator, name, bug):
    """What the emulator says, and whether the output is as it should be."""
    x, out = torch.randn(128), poisoned(128)
    emulator.forget()
    emulator.register(x, "input")
    emulator.register(out, "output")
    message = call(emulator, "probe", list(SEEN).index(name), bug, x, out)
    return message, torch.equal(out, x.roll(-32) if name in ("missing_barrier", "early_refill") else x)


@pytest.mark.parametrize("name", SEEN)
def test_a_bug_is_seen_and_the_right_kernel_passes(emulator, name):
    results = []
    for seed in SCHEDULES:
        emulator.schedule(seed)
        assert run_probe(emulator, name, bug=False) == ("", True)
        results.append(run_probe(emulator, name, bug=True))
    if SEEN[name] is None:
        assert not all(right for message, right in results)
        assert {message for message, _ in results} == {""}
    else:
        assert any(SEEN[name] in message for message, _ in results), results
        assert all(message for message, _ in results)


def test_every_probe_is_tested(emulator):
    names = [*SEEN, "shared_read_out_of_bounds"]
    assert [call(emulator, "probe_name", i) for i in range(len(names) + 1)] == [*names, None]


@pytest.mark.parametrize("variant", ["asan", "tsan"])
@pytest.mark.parametrize("name", SANITIZED)
def test_what_sanitizers_see(emulator, variant, name):
    if reason := sanitize.why_not(variant):
        pytest.skip(reason)
    library = build([HERE / "probes.cu"], variant=variant)
    index = [*SEEN, "shared_read_out_of_bounds"].index(name)
    expected = SANITIZED[name][("asan", "tsan").index(variant)]
    right, wrong = (sanitize.python(variant, "probe.py", library, index, bug) for bug in (0, 1))
    assert right.returncode == 0, right.stderr[:3000]
    assert (wrong.returncode != 0) == bool(expected) and expected in wrong.stderr


def test_schedules_differ_and_repeat(emulator):
    orders = []
    for function in ("launch_number_blocks", "launch_number_warps"):
        for seed in (0, 1, 2, 1):
            emulator.schedule(seed)
            order = poisoned(16, dtype=torch.int32)
            assert call(emulator, function, order) == ""
            assert sorted(order.tolist()) == list(range(16))
            orders.append(order.tolist())
    blocks, warps = orders[:4], orders[4:]
    for first, second, third, again in (blocks, warps):
        assert first == list(range(16)) and second == again
        assert first != second != third != first


def launch(emulator, x=1, y=1, z=1, block=32, shared=0):
    return call(emulator, "launch_copy", torch.zeros(1024), torch.zeros(1024), x, y, z, block, shared)


def test_grids_and_blocks_that_no_gpu_has(emulator):
    assert "too large for one launch, 1 x 65536 x 1 blocks" in launch(emulator, y=65536)
    assert "too large for one launch, 1 x 1 x 65536 blocks" in launch(emulator, z=65536)
    assert "no grid can have 0 x 1 x 1 blocks" in launch(emulator, x=0)
    assert "no block can have 1025 x 1 x 1 threads" in launch(emulator, block=1025)
    assert "no block can have 0 x 1 x 1 threads" in launch(emulator, block=0)
    assert launch(emulator, block=1024) == ""


@pytest.mark.parametrize(("capability", "kilobytes"), [(80, 163), (86, 99), (90, 227), (120, 99)])
def test_shared_memory_of_each_target(emulator, capability, kilobytes):
    emulator.target(capability)
    fits, too_much = kilobytes << 10, (kilobytes << 10) + 1
    assert f"at most {fits} bytes of shared memory here, not {too_much}" in launch(emulator, shared=too_much)


def test_static_and_dynamic_shared_memory_count_together(emulator):
    x = torch.randn(128)
    assert call(emulator, "launch_static", x, poisoned(128), 18 << 10) == ""
    assert "30720 bytes of static and 18433" in call(emulator, "launch_static", x, poisoned(128), (18 << 10) + 1)


def test_opting_in_to_shared_memory_waits_for_no_capture(emulator):
    emulator.recorder.capture(0)
    assert "call it once before capturing" in launch(emulator, shared=60 << 10)
    emulator.recorder.capture(None)
    assert launch(emulator, shared=60 << 10) == ""
    emulator.recorder.capture(0)
    assert launch(emulator, shared=60 << 10) == ""


def test_rows_of_a_matrix_have_bounds_of_their_own(emulator):
    memory = torch.zeros(64, 4)
    assert call(emulator, "launch_copy", memory[:, :2], poisoned(128), 1, 1, 1, 2, 0) == ""
    message = call(emulator, "launch_copy", memory[:, :2], poisoned(128), 1, 1, 1, 3, 0)
    assert "byte 8 of float32[64, 2], which has 64 rows of 8 bytes, 16 apart" in message


@pytest.mark.parametrize("dtype", DTYPES)
def test_mma_is_the_product(emulator, dtype):
    k = 8 if dtype == torch.float32 else 16
    a, b, d = torch.randn(16, k).to(dtype), torch.randn(8, k).to(dtype), poisoned(16, 8)
    assert call(emulator, "launch_product", DTYPES[dtype], a, b, d) == ""
    if dtype == torch.float32:
        a, b = rounded_to_tf32(a), rounded_to_tf32(b)
    torch.testing.assert_close(d.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix_deals_out_rows_or_columns(emulator, trans):
    source, out = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16), poisoned(32, 4, dtype=torch.int32)
    assert call(emulator, "launch_matrices", source, out, 16, trans) == ""
    expected = (source.mT if trans else source).contiguous().view(torch.int32).reshape(4, 32).T
    assert torch.equal(out, expected)


@pytest.mark.parametrize(("stride", "conflicts"), [(16, 0), (32, 1), (64, 3), (128, 7), (144, 0), (48, 0)])
def test_bank_conflicts_of_ldmatrix(emulator, stride, conflicts):
    """Eight rows of 16 bytes are one cycle if they fall on the 128 bytes of all banks once."""
    with emulator.recording() as launches:
        source, out = torch.zeros(4, 8, 8, dtype=torch.int16), poisoned(32, 4, dtype=torch.int32)
        assert call(emulator, "launch_matrices", source, out, stride, False) == ""
    assert (launches[0].ldmatrix, launches[0].ldmatrix_conflicts) == (4, 4 * conflicts)


def test_shuffles(emulator):
    x, out = torch.randn(32, dtype=torch.float64), poisoned(3, 32, dtype=torch.float64)
    assert call(emulator, "launch_shuffles", x, out) == ""
    lane = torch.arange(32)
    down = torch.where(lane < 28, lane + 4, lane)
    assert torch.equal(out, torch.stack([x[5].expand(32), x[lane ^ 3], x[down]]))


def rounded_to_tf32(x):
    """Ties away from zero, on the bits."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def awkward_floats():
    """Of all exponents, and halfway between, just above and below what 16-bit types have."""
    x = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    between = (halves[:-1] + halves[1:]) / 2
    above, below = (torch.nextafter(between, torch.full_like(between, end)) for end in (torch.inf, -torch.inf))
    ties = (torch.arange(2**16, dtype=torch.int32) << 16 | 0x8000).view(torch.float32)  # of bfloat16
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 65519.99, 65520.0, 2.0**-25, 2.0**-24, 2.0**-149])
    return torch.cat([x, halves, between, above, below, ties, special])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits_is_torchs(emulator, dtype):
    x = awkward_floats()
    out = poisoned(len(x), dtype=dtype)
    assert call(emulator, "launch_convert", DTYPES[dtype], x, out, len(x)) == ""
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_read_as_torch_reads_it(emulator, dtype):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    out = poisoned(len(x))
    assert call(emulator, "launch_convert_back", DTYPES[dtype], x, out, len(x)) == ""
    torch.testing.assert_close(out, x.float(), rtol=0, atol=0, equal_nan=True)


def test_rounding_to_tf32(emulator):
    x = awkward_floats()
    x = x[x.isfinite()]
    out = poisoned(len(x))
    assert call(emulator, "launch_convert", 0, x, out, len(x)) == ""
    assert torch.equal(out, rounded_to_tf32(x))


def test_counts(emulator):
    with emulator.recording() as launches:
        run_probe(emulator, "missing_barrier", bug=False)
        run_probe(emulator, "lax_wait", bug=False)
    first, second = launches
    assert (first.grid, first.block, first.static_shared, first.barriers) == ((1, 1, 1), (128, 1, 1), 512, 1)
    assert (second.dynamic_shared, second.copies) == (512, 32)
    for launched in launches:
        assert launched.traffic["input"].unique_read == launched.traffic["input"].bytes_read == 512
        assert launched.traffic["output"].unique_written == launched.traffic["output"].bytes_written == 512
        assert launched.traffic["output"].bytes_read == launched.traffic["input"].bytes_written == 0


def test_bytes_that_are_read_twice_count_once(emulator):
    x = torch.randn(128)
    emulator.register(x, "x")
    with emulator.recording() as launches:
        assert call(emulator, "launch_copy", x, poisoned(128), 1, 1, 1, 64, 0) == ""
        message = call(emulator, "launch_copy", x, torch.zeros(128), 2, 1, 1, 64, 0)
    assert "race" in message and len(launches) == 1  # two blocks write the same; a launch that failed is not recorded
    assert launches[0].traffic["x"].unique_read == 256
