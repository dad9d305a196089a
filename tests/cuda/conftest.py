"""The emulated CUDA kernels for the tests here; tests/conftest.py has the rule for errors."""

import os

import pytest
from gpusim.build import ROOT, build, why_not
from gpusim.harness import Emulator


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    """The kernels of csrc/cuda as g++ builds them; built once for the same sources.

    GPUSIM_ONLY=dropout,ewc leaves the others out, for those who are at work on a few.
    """
    if reason := why_not():
        pytest.skip(reason)
    only = os.environ.get("GPUSIM_ONLY")
    csrc = ROOT / "csrc"
    kernels = [csrc / "cuda" / f"{name}.cu" for name in only.split(",")] if only else []
    return Emulator(build([csrc / "bindings.cpp", *kernels] if only else None))


@pytest.fixture
def cuda(emulator, monkeypatch):
    """The backend `cuda`, forced, with its kernels on CPU tensors; bounds, alignment and races are checked."""
    monkeypatch.setenv("LLMBUILDER_BACKEND", "cuda")
    with emulator.serving():
        yield emulator
    emulator.schedule(0)


@pytest.fixture(params=range(4))
def schedule(cuda, request):
    """The test runs once for each of these orders of threads and blocks."""
    cuda.schedule(request.param)
    return request.param
