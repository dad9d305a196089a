"""The Triton kernels in Triton's interpreter, hardened by guard.py, each file of interpreted/ in a process of its own.

Whether triton interprets or compiles is settled when it is imported, so that one process can't do both.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_interpreted(name):
    pytest.importorskip("triton")
    seed = random.randrange(2**31)  # of the order of the programs
    environment = {**os.environ, "TRITON_INTERPRET": "1", "GUARD_SEED": str(seed)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=3", str(FOLDER / name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"GUARD_SEED={seed} {' '.join(command)}\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
