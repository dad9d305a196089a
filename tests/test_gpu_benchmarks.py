"""The GPU benchmarks without a GPU: every path of their code, every check of results, and not a figure kept."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gpusim.build import why_not
from gpusim.record import KERNELS

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks/gpu/run.py"
RESULTS = ROOT / "benchmarks/results"


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_dry_run_takes_every_path_and_writes_nothing():
    before = sorted(RESULTS.glob("gpu_*"))
    done = run("--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("sanitizer", "layer", "bandwidth", "roofline", "graph", "step"):
        assert f"== {name}\n" in done.stdout
    assert done.stdout.count(" rows of ") == 6 and "ms=" not in done.stdout
    assert sorted(RESULTS.glob("gpu_*")) == before
    launched = dict(re.findall(r"(\w+) ([1-9]\d*)", done.stdout.partition("== kernels launched by ")[2]))
    assert KERNELS.keys() - launched.keys() == {"dropout_mask"}  # which nobody measures


def test_a_benchmark_that_does_not_exist_is_named():
    done = run("--dry-run", "speed")
    assert done.returncode == 1 and "no such benchmark: speed" in done.stderr
