"""What every test relies on, and the rule by which an operator's error is too large."""

import atexit
import os
import shutil
import tempfile

import pytest
import torch

# Child processes must import what the tests import, not the source tree that they happen to be started in: by default
# `python -c` and multiprocessing's servers put the working directory first.
os.environ["PYTHONSAFEPATH"] = "1"

# Text that models make is kept in a folder of this run alone.
os.environ["LLMBUILDER_CACHE"] = tempfile.mkdtemp()
atexit.register(shutil.rmtree, os.environ["LLMBUILDER_CACHE"], ignore_errors=True)


@pytest.fixture
def one_thread():
    """torch computes on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
