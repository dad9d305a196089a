"""Tests on a real GPU: `pytest -m gpu tests/gpu`. Where there is none they are skipped, and say why.

`LLMBUILDER_GPU_DRY_RUN=1` runs what of them needs no GPU's clock or streams on the CPU, with the emulated CUDA kernels:
it shows that the tests themselves work.
"""

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
        with emulator.serving():
            yield request.param


@pytest.fixture
def needs_streams():
    if DRY:
        pytest.skip("streams, graphs and devices are a GPU's")
