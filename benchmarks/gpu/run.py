"""Measures the GPU kernels on the GPU that is here and writes benchmarks/results/gpu_*.csv (`make bench-gpu`).

    python benchmarks/gpu/run.py [name ...]      names: sanitizer layer bandwidth roofline graph step; default all
    python benchmarks/gpu/run.py --dry-run       the same code without a GPU: tiny shapes, our launchers over a runtime
                                                 that records and checks each launch, the CUDA kernels emulated,
                                                 every check made, no figure kept

Results are checked before anything is timed; a wrong one ends the run.
"""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out

import bench_bandwidth
import bench_graph
import bench_layer
import bench_roofline
import bench_step
import sanitize
import torch
from stage import Stage

BENCHMARKS = {
    module.NAME: module for module in (sanitize, bench_layer, bench_bandwidth, bench_roofline, bench_graph, bench_step)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"which of {' '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--dry-run", action="store_true", help="take the same way on a CPU and keep no figure")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(BENCHMARKS):
        raise SystemExit(f"no such benchmark: {', '.join(unknown)}; there are {' '.join(BENCHMARKS)}")
    if not arguments.dry_run and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; --dry-run checks the benchmarks without one")
    torch.manual_seed(0)
    emulator = _emulator() if arguments.dry_run else None
    stage = Stage(emulator)
    with emulator.serving() if emulator else nullcontext():
        for name in arguments.names or BENCHMARKS:
            print(f"== {name}", flush=True)
            stage.write(name, list(BENCHMARKS[name].rows(stage)))
    if emulator:
        print("== kernels launched by " + ", ".join(f"{name} {n}" for name, n in emulator.recorder.launched.items()))


def _emulator():
    """The CUDA launchers and kernels, built for the CPU."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
    from gpusim.build import build
    from gpusim.harness import Emulator

    return Emulator(build())


if __name__ == "__main__":
    main()
