"""What the tests of the operators share: backends to run under, and memory that holds NaN."""

import pytest
import torch


@pytest.fixture(params=["reference", "cpu"])
def backend(request, monkeypatch):
    """The test runs once by each backend that this machine has, forced."""
    monkeypatch.setenv("LLMBUILDER_BACKEND", request.param)
    return request.param


def poisoned_memory():
    """Fills memory that torch is about to hand out again with NaN, so that a result that was never written shows."""
    blocks = [torch.full((size,), torch.nan) for size in (64, 1024, 16384, 65536)]
    del blocks


@pytest.fixture(autouse=True)
def poison():
    poisoned_memory()
