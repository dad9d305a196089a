"""What the tests of the operators share: backends to run under, and the rule by which an error is too large."""

import pytest
import torch


@pytest.fixture(params=["reference", "cpu"])
def backend(request, monkeypatch):
    """The test runs once by each backend that this machine has, forced."""
    monkeypatch.setenv("LLMBUILDER_BACKEND", request.param)
    return request.param


@pytest.fixture(scope="session")
def check_error():
    """check(out, same_dtype, exact): the largest error is at most twice torch's in the same dtype, plus one last place.

    Lists of results stand for several draws of the same case: where results are small the largest error of one draw
    is chance, so it is averaged over them. ``dtype`` is that of the products, where it isn't that of the result.
    """

    def check(out, same_dtype, exact, name="result", dtype=None):
        draws = [out, same_dtype, exact] if isinstance(out, list) else [[out], [same_dtype], [exact]]
        sums = sum(torch.stack(_errors(*draw, name, dtype)) for draw in zip(*draws, strict=True))
        error, allowed, unit = (sums / len(draws[0])).tolist()
        assert error <= 2 * allowed + unit, f"{name}: error {error:.3e}, torch's {allowed:.3e}, last place {unit:.3e}"

    return check


def _errors(out, same_dtype, exact, name, dtype):
    """Largest error of out, of torch in the same dtype, and the last place of the largest value."""
    assert out.shape == exact.shape, f"{name}: {list(out.shape)}, expected {list(exact.shape)}"
    if not exact.numel():
        return torch.zeros(3, dtype=torch.float64).unbind()
    largest = exact.abs().max().to(dtype or out.dtype)
    unit = torch.nextafter(largest, torch.full_like(largest, torch.inf)).double() - largest.double()
    return (out.double() - exact).abs().max(), (same_dtype.double() - exact).abs().max(), unit


def poisoned_memory():
    """Fills memory that torch is about to hand out again with NaN, so that a result that was never written shows."""
    blocks = [torch.full((size,), torch.nan) for size in (64, 1024, 16384, 65536)]
    del blocks


@pytest.fixture(autouse=True)
def poison():
    poisoned_memory()
