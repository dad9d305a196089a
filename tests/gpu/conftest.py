"""Tests on a real GPU: `pytest -m gpu tests/gpu`. Where there is none they are skipped, and say why.

`LLMBUILDER_GPU_DRY_RUN=1` runs what of them needs no second stream or GPU on the CPU: our launchers over the recording
runtime, which has the emulator run the kernels. It shows that the tests themselves work, and watches every launch.
"""

from functools import partial

import pytest
import torch
from gpu.place import DRY
from gpusim.build import build
from gpusim.harness import Emulator

from llmbuilder.ops import _backend


def backends():
    """Those that can serve bf16 tensors on this machine's first GPU."""
    if DRY:
        return ["cuda"]
    if not torch.cuda.is_available():
        return []
    return [name for name in ("cuda", "triton") if not _backend.BACKENDS[name](torch.device("cuda", 0), torch.bfloat16)]


def pytest_generate_tests(metafunc):
    if "backend" not in metafunc.fixturenames:
        return
    found = backends() or [pytest.param(None, marks=pytest.mark.skip(reason="no GPU that our kernels can run on"))]
    metafunc.parametrize("backend", found, indirect=True)


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def emulator():
    return Emulator(build()) if DRY else None


@pytest.fixture
def backend(request, monkeypatch, emulator):
    """The test runs once by each backend that this GPU has, forced."""
    monkeypatch.setenv("LLMBUILDER_BACKEND", request.param)
    if emulator is None:
        yield request.param
    else:
        emulator.recorder.launched.clear()
        with emulator.serving():
            yield request.param
        assert emulator.recorder.launched, "no launcher of ours was called"


@pytest.fixture
def launched(backend, emulator):
    """How many kernels the launchers that the test has called so far have launched."""
    if emulator is None:
        pytest.skip("nothing records the launches on a GPU")
    return emulator.recorder.launched


@pytest.fixture
def captured(emulator):
    """captured(step): the step's results, and a function that computes them again in the same memory. On a GPU that is
    a CUDA graph's replay; in a dry run a step in which nothing is done that no graph can do, and then plain steps."""
    return partial(_dry_capture, emulator) if DRY else _graph


def _graph(step):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = step()
    return results, graph.replay


def _dry_capture(emulator, step):
    for _ in range(3):
        step()
    with emulator.capturing():
        results = step()

    def replay():
        for kept, computed in zip(results, step(), strict=True):
            kept.copy_(computed)

    return results, replay


@pytest.fixture
def needs_streams():
    if DRY:
        pytest.skip("streams are a GPU's")
