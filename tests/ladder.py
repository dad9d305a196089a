"""The ladder by which the GPU kernels are proved without a GPU (docs/kernels.md): python tests/ladder.py [rung ...]

Runs the rungs in order, all of them whatever fails, a line each: what it proves, how it went, how long it took. Rung 9
needs a GPU: `pytest -m gpu` and `make bench-gpu`. Exits with 1 when a rung failed.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from codegen.nvcc import nvcc  # noqa: E402 (found by the path above)

TEST = ("-m", "pytest", "-q")
LAUNCHERS = ("tests/gpusim/test_record.py", "tests/cuda/test_launchers.py")
BENCHMARKS = ("tests/test_gpu_benchmarks.py",)


@dataclass(frozen=True)
class Rung:
    number: str
    proves: str
    command: tuple[str, ...]  # arguments of Python
    needs_nvcc: bool = False


LADDER = [
    Rung("1", "the reference is right: gradients in fp64, odd shapes, strides", (*TEST, "tests/ops/test_reference.py")),
    Rung("2", "the CPU's kernels agree with it", (*TEST, "tests/ops/test_native.py", "tests/ops/test_lora.py")),
    Rung("3", "one mask everywhere, to the bit", (*TEST, "tests/ops/test_dropout.py", "tests/cuda/test_dropout.py")),
    Rung("4", "Triton's kernels, interpreted", (*TEST, "tests/triton")),
    Rung("5a", "the CUDA kernels, emulated: schedules, bounds, sanitizers", (*TEST, "tests/gpusim", "tests/cuda")),
    Rung("5b", "the PTX of both, interpreted: races, bounds, sectors, banks", (*TEST, "tests/ptx")),
    Rung("6a", "each seeded bug in the CUDA kernels is seen", ("tests/mutations/cuda.py",)),
    Rung("6b", "each seeded bug in Triton's kernels is seen", ("tests/mutations/triton.py",)),
    Rung("7", "machine code for six architectures: no spills, floors reached", (*TEST, "tests/codegen"), True),
    Rung("8a", "launchers, and a dry run of the GPU's benchmarks, both recorded", (*TEST, *LAUNCHERS, *BENCHMARKS)),
    Rung("8b", "a dry run of the GPU's tests, recorded", (*TEST, "tests/gpu")),
]


def main() -> int:
    wanted = sys.argv[1:]
    failed = []
    for rung in LADDER:
        if wanted and rung.number not in wanted and rung.number[0] not in wanted:
            continue
        if rung.needs_nvcc and not nvcc():
            print(f"{rung.number:3} skipped (no nvcc here): {rung.proves}", flush=True)
            continue
        start = time.monotonic()
        command = [sys.executable, *rung.command]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
        word = "FAILED" if done.returncode else "passed"
        print(f"{rung.number:3} {word} {time.monotonic() - start:6.0f} s  {rung.proves}", flush=True)
        print(f"              python {' '.join(rung.command)}", flush=True)
        if done.returncode:
            failed.append(rung.number)
            print(done.stdout[-4000:] + done.stderr[-2000:], flush=True)
    print(f"failed: {', '.join(failed)}" if failed else "every rung that ran has passed")
    return 1 if failed else 0


def environment() -> dict[str, str]:
    """Scripts find what tests share; PYTHONSAFEPATH keeps the sources from being imported for what is installed."""
    path = os.pathsep.join(filter(None, (str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "LLMBUILDER_GPU_DRY_RUN": "1"}


if __name__ == "__main__":
    sys.exit(main())
