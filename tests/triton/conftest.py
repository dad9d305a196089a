"""Tests of the Triton kernels. Those in interpreted/ run in processes that test_interpreted.py starts."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for guard.py and aot.py

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if INTERPRETED else ["interpreted"]

if INTERPRETED:
    import guard
    from hypothesis import Phase, settings

    settings.register_profile("thorough", deadline=None, max_examples=12)
    settings.register_profile(
        "quick", deadline=None, max_examples=4, derandomize=True, phases=[Phase.explicit, Phase.generate]
    )
    settings.load_profile(os.environ.get("INTERPRETED_PROFILE", "thorough"))
    guard.install(int(os.environ.get("GUARD_SEED", "0")))
    # Memory that nobody has written yet holds NaN.
    torch.use_deterministic_algorithms(True)


@pytest.fixture(scope="session")
def check_error():
    """check(out, same_dtype, exact): the largest error is at most twice torch's in the same dtype, plus one last place.

    Lists of results stand for several draws of the same case, over which the errors are averaged.
    """

    def check(outs, same_dtypes, exacts, name="result"):
        draws = zip(outs, same_dtypes, exacts, strict=True)
        error, allowed, unit = (sum(torch.stack(_errors(*draw, name)) for draw in draws) / len(outs)).tolist()
        assert error <= 2 * allowed + unit, f"{name}: error {error:.3e}, torch's {allowed:.3e}, last place {unit:.3e}"

    return check


def _errors(out, same_dtype, exact, name):
    """Largest error of out, of torch in the same dtype, and the last place of the largest value."""
    assert out.shape == exact.shape, f"{name}: {list(out.shape)}, expected {list(exact.shape)}"
    if not exact.numel():
        return torch.zeros(3, dtype=torch.float64).unbind()
    assert torch.isfinite(out).all(), f"{name}: not written, or made of what was not written"
    largest = exact.abs().max().to(same_dtype.dtype)
    unit = torch.nextafter(largest, torch.full_like(largest, torch.inf)).double() - largest.double()
    return (out.double() - exact).abs().max(), (same_dtype.double() - exact).abs().max(), unit
