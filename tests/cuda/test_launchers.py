"""The launchers as nvcc and as g++ compile them, over a CUDA runtime that records what they ask of it."""

import ctypes
import math
import re
from contextlib import contextmanager

import pytest
from codegen import nvcc
from gpusim import build, record
from gpusim.calls import Memory, calls, ewc_penalty

DEVICE, STREAM = 2, 2 * record.STREAMS + 7
OPTIONAL = {"bias", "row_weights"}  # may be null
NOWHERE = {"dX"}  # a matrix whose null address says that it isn't wanted
COUNTS = {"rows", "columns", "count", "chunks"}


BY_NVCC = pytest.mark.parametrize("recorder", ["nvcc"], indirect=True)


@pytest.fixture(scope="module", params=["nvcc", "g++"])
def recorder(request):
    """The launchers of each compiler, which put kernels on streams that nobody runs."""
    if reason := build.why_not():
        pytest.skip(reason)
    if request.param == "nvcc" and not nvcc.nvcc():
        pytest.skip("no nvcc was found, which compiles the launchers")
    with idle(record.build() if request.param == "nvcc" else build.build()) as recorder:
        yield recorder


@contextmanager
def idle(path):
    """A recorder that has no kernel run."""
    recorder = record.Recorder(path)
    with recorder.run_by(None):
        yield recorder


@pytest.fixture(scope="module")
def memory():
    return Memory()


@pytest.fixture(scope="module")
def every_call(recorder, memory):
    return list(calls(recorder.module, memory))


@pytest.fixture(autouse=True)
def clean(recorder):
    yield
    recorder.capture(None)
    recorder.clear()


@BY_NVCC
def test_launchers_call_nothing_that_allocates_copies_or_waits(recorder):
    assert record.called(record.objects()) <= record.ALLOWED


@BY_NVCC
def test_what_launchers_must_not_do_is_seen(recorder, tmp_path):
    source = record.HERE / "forbidden.cu"
    compiled = nvcc.make(tmp_path / "forbidden.o", nvcc.nvcc(), "-c", "-arch=sm_80", "-Xcompiler=-fPIC", str(source))
    wrong = {"cudaMalloc", "cudaStreamSynchronize", "__cudaPushCallConfiguration"}
    assert record.called([compiled]) - record.ALLOWED == wrong
    library = ctypes.CDLL(str(build.link([record.HERE / "recorder.cpp"], [compiled], tmp_path)))
    library.launch_badly(None, ctypes.c_void_p(STREAM))
    library.recorder_events.restype = ctypes.c_char_p
    events = [line.split("\t") for line in library.recorder_events().decode().splitlines()]
    forbidden = [words[1] for words in events if words[0] == "forbidden"]
    assert forbidden == ["cudaMalloc", "cudaStreamSynchronize", "kernel<<<>>>"]


def test_kernels_are_the_launchers_own_and_go_to_the_device_and_the_stream(recorder, every_call):
    for call in every_call:
        launcher = call.name.split("-")[0]
        with recorder.watching(launcher, DEVICE, STREAM):
            call.launch(DEVICE, STREAM)
        assert len(recorder.launches()) == number_of_kernels(launcher, call.arguments), call.name
    assert recorder.launched.keys() == record.KERNELS.keys()


def number_of_kernels(launcher, arguments):
    """Sums that several blocks share take a second launch, gradients by B and S of more than 32 ranks a third."""
    if launcher == "lora_grad_sb":
        return 2 if arguments["B"][2] <= 32 else 3
    return 2 if arguments.get("workspace") else 1


def test_every_launcher_is_watched(recorder):
    host = re.compile(r".*_(workspace|bytes|table|version)|DType|__.*")
    assert {name for name in vars(recorder.module) if not host.fullmatch(name)} == record.KERNELS.keys()


def test_the_device_is_left_alone_where_it_is_current(recorder, every_call):
    every_call[0].launch(0, 0)
    assert "set_device" not in {words[0] for words in recorder.events()}


@BY_NVCC
def test_no_block_is_larger_than_its_kernel_was_compiled_for(recorder, every_call):
    """__launch_bounds__, which nvcc hands on to the driver and the emulator doesn't see."""
    bounds = {}
    for source in nvcc.sources():
        for symbol, threads in re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", nvcc.ptx(source)):
            bounds[symbol] = int(threads)
    seen = set()
    for call in every_call:
        recorder.clear()
        call.launch(DEVICE, STREAM)
        for each in recorder.launches():
            assert math.prod(each.block) <= bounds[each.symbol], each.kernel
            seen.add(each.symbol)
    assert len(seen) > 30


@BY_NVCC
def test_both_compilers_launchers_launch_the_same(recorder, every_call, memory):
    """What holds for the one's launches, such as their bounds, holds for the other's in the dry runs."""
    with idle(build.build()) as other:
        for by_nvcc, by_gcc in zip(every_call, calls(other.module, memory), strict=True):
            found = []
            for watch, call in ((recorder, by_nvcc), (other, by_gcc)):
                watch.clear()
                call.launch(DEVICE, STREAM)
                found.append([(each.name, each.grid, each.block, each.shared) for each in watch.launches()])
            assert found[0] == found[1], by_nvcc.name


def launched(recorder, call, device, stream):
    recorder.clear()
    call.launch(device, stream)
    return [(each.symbol, each.grid, each.block, each.shared) for each in recorder.launches()]


def test_a_capture_records_the_same_launches(recorder, every_call):
    """With what was set up before; nothing is set up, allocated or waited for while the stream is captured."""
    for call in every_call:
        recorder.capture(None)
        before = launched(recorder, call, DEVICE, STREAM)
        recorder.capture(STREAM)
        assert launched(recorder, call, DEVICE, STREAM) == before
        assert {words[0] for words in recorder.events()} <= {"get_device", "set_device", "launch"}


def test_a_kernel_that_needs_setting_up_refuses_to_be_captured_first(recorder, every_call):
    """On a device that it hasn't been set up on; nothing of its call is launched."""
    stream = 3 * record.STREAMS
    refused = []
    for call in every_call:
        recorder.capture(stream)
        recorder.clear()
        try:
            call.launch(3, stream)
        except ValueError as error:
            assert "call it once before capturing" in str(error)
            refused.append(call)
            assert not [words for words in recorder.events() if words[0] in ("attribute", "forbidden")]
        else:
            assert all(each.shared <= 48 << 10 for each in recorder.launches())
    assert refused
    for call in refused:
        recorder.capture(None)
        call.launch(3, stream)
        recorder.capture(stream)
        call.launch(3, stream)


def bad_arguments(call):
    """Changes that a launcher can see are wrong."""
    for name, value in call.arguments.items():
        if isinstance(value, tuple) and len(value) == 4:
            address, rows, columns, stride = value
            if name in NOWHERE and not address:
                continue
            if name not in NOWHERE:
                yield {name: (0, rows, columns, stride)}
            if name != "logits":  # whose targets have no length
                yield {name: (address, rows + 1, columns, stride)}
                yield {name: (address, rows, columns + 1, stride + 1)}
            yield {name: (address, -1, columns, stride)}
            if rows > 1:
                yield {name: (address, rows, columns, columns - 1)}
        elif isinstance(value, tuple):
            yield {name: (value[0], 1, 65536)}
            yield {name: (0, 1, 1)}
        elif name in COUNTS:
            yield {name: -1}
        elif isinstance(value, int) and not isinstance(value, bool) and value and name not in OPTIONAL:
            yield {name: 0}
            if name == "workspace":
                yield {name: value + 4}


def test_bad_arguments_are_refused_before_anything_is_launched(recorder, every_call):
    wrong, seen = [], 0
    for call in every_call:
        launcher = call.name.split("-")[0]
        for change in bad_arguments(call):
            recorder.clear()
            seen += 1
            try:
                call.launch(DEVICE, STREAM, **change)
            except ValueError as error:
                named = str(error).startswith(f"{launcher}: ")
                if not named or recorder.events():
                    wrong.append((call.name, change, str(error), recorder.events()))
            except RuntimeError as error:
                wrong.append((call.name, change, f"refused by the runtime: {error}"))
            else:
                wrong.append((call.name, change, "not refused"))
    assert not wrong, wrong[:20]
    assert seen > 500


def enlarged(call):
    """All its matrices with 2^40 in the place of their common number of rows."""
    matrices = {name: value for name, value in call.arguments.items() if isinstance(value, tuple) and len(value) == 4}
    rows = next((matrices[name][1] for name in ("x", "dY", "S", "logits") if name in matrices), None)
    large = {name: (at, 1 << 40 if m == rows else m, n, step) for name, (at, m, n, step) in matrices.items()}
    return large | {name: 1 << 40 for name in COUNTS if name in call.arguments}


def test_what_no_grid_can_hold_is_refused_or_cut(recorder, every_call):
    wrong = []
    for call in every_call:
        recorder.clear()
        try:
            call.launch(DEVICE, STREAM, **enlarged(call))
        except ValueError as error:
            if recorder.launches():
                wrong.append((call.name, f"refused after a launch: {error}"))
        except RuntimeError as error:
            wrong.append((call.name, f"refused by the runtime: {error}"))
    assert not wrong


def test_ewc_over_a_thousand_tensors_takes_two_launches(recorder, memory):
    sizes = [1 + 37 * i % 5000 for i in range(1000)]
    groups = [[memory.floats("bf16", 1)] * 1000 for _ in range(4)]
    ewc_penalty(recorder.module, memory, "bf16", groups, sizes).launch(DEVICE, STREAM)
    assert len(recorder.launches()) == 2


def test_what_the_runtime_reports_is_an_error_and_is_not_left_for_others(recorder, every_call):
    for function, error in (("cudaLaunchKernel", 701), ("cudaSetDevice", 46), ("cudaGetDevice", 35)):
        recorder.fail(function, error)
        try:
            with pytest.raises(RuntimeError, match=rf"{function} was told to fail \(error {error}\)"):
                every_call[0].launch(DEVICE, STREAM)
        finally:
            recorder.fail(function, 0)
        assert recorder.last_error() == 0
    recorder.clear()
    with pytest.raises(RuntimeError, match="there are 4 devices, no device 9"):
        every_call[0].launch(9, 9 * record.STREAMS)
    assert not recorder.launches()
