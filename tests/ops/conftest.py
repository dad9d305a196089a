"""What the tests of the operators share: backends to run under, and the rule by which an error is too large."""

import pytest
import torch


@pytest.fixture(params=["reference", "cpu"])
def backend(request, monkeypatch):
    """The test runs once by each backend that this machine has, forced."""
    monkeypatch.setenv("LLMBUILDER_BACKEND", request.param)
    return request.param


@pytest.fixture
def check_error():
    """check(out, same_dtype, exact): out errs at most twice as much as torch in the same dtype, and one last place."""

    def check(out, same_dtype, exact, name="result"):
        assert out.shape == exact.shape, f"{name}: {list(out.shape)}, expected {list(exact.shape)}"
        if not exact.numel():
            return
        error, allowed = ((t.double() - exact).abs().max() for t in (out, same_dtype))
        largest = exact.abs().max().to(out.dtype)
        unit = torch.nextafter(largest, torch.full_like(largest, torch.inf)).double() - largest.double()
        assert error <= 2 * allowed + unit, f"{name} {list(out.shape)}: error {error:.3e}, torch's {allowed:.3e}"

    return check


def poisoned_memory():
    """Fills memory that torch is about to hand out again with NaN, so that a result that was never written shows."""
    blocks = [torch.full((size,), torch.nan) for size in (64, 1024, 16384, 65536)]
    del blocks


@pytest.fixture(autouse=True)
def poison():
    poisoned_memory()
