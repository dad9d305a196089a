"""Every launcher in every variant under AddressSanitizer and ThreadSanitizer, in eight orders of threads and blocks."""

import pytest
from gpusim import sanitize
from gpusim.build import build, why_not

SCHEDULES = range(8)


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_kernels_are_clean(variant):
    if reason := why_not() or sanitize.why_not(variant):
        pytest.skip(reason)
    result = sanitize.python(variant, "exercise.py", build(variant=variant), *SCHEDULES)
    done = result.stdout.splitlines()
    assert result.returncode == 0, f"after {done[-1:]}: {result.stderr[:6000]}"
    assert len(done) % len(SCHEDULES) == 0 and len(done) > 50 * len(SCHEDULES)
