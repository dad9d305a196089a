"""Where a GPU benchmark runs: the GPU, or, for a dry run, the CPU with the emulated kernels in the GPU's place.

A dry run takes the same way through the code with tiny shapes, and a runtime that records our launchers watches each
launch. Its times mean nothing and are not kept.
"""

import csv
import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

RESULTS = Path(__file__).resolve().parents[1] / "results"
FLUSH = 256 << 20  # bytes, more than any GPU's second-level cache


class Stage:
    def __init__(self, emulator=None):
        """With an emulator (tests/gpusim/harness.py) it is a dry run."""
        self.dry = emulator is not None
        self.device = torch.device("cpu" if self.dry else "cuda")
        self._emulator = emulator
        self._flush = torch.empty(1024 if self.dry else FLUSH, dtype=torch.uint8, device=self.device)

    def pick(self, real, tiny):
        """What to measure, or its stand-in in a dry run."""
        return tiny if self.dry else real

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype).requires_grad_(grad)

    def times(self, functions: dict[str, Callable[[], object]], repeats: int = 50) -> dict[str, list[float]]:
        """Seconds of each call, a list each, with a cold cache. Every repeat runs all of them, each time in another
        order, so that drift of the clock hits all alike."""
        names = list(functions)
        found: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(1 if self.dry else 5):
            for name in names:
                functions[name]()
        for i in range(2 if self.dry else repeats):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                self._flush.zero_()
                found[name].append(self._once(functions[name]))
        return found

    def medians(self, functions: dict[str, Callable[[], object]], repeats: int = 50) -> dict[str, float]:
        return {name: statistics.median(times) for name, times in self.times(functions, repeats).items()}

    def _once(self, function: Callable[[], object]) -> float:
        if self.dry:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def captured(self, function: Callable[[], object]) -> Callable[[], object]:
        """The function as a CUDA graph's replay; in a dry run itself, once it has done nothing that no graph can do."""
        if self.dry:
            function()
            with self._emulator.capturing():
                function()
            return function
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # loaded and tuned before the capture
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay

    def peak_memory(self, function: Callable[[], object]) -> int:
        """Bytes that torch held at most during a call, above what it holds already."""
        if self.dry:
            function()
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def backends(self) -> list[str]:
        """Ours that can serve here."""
        return ["cuda"] if self.dry else ["cuda", "triton"]

    def machine(self) -> dict[str, str]:
        """Columns that every result row carries."""
        known = {name: metadata.version(name) for name in ("torch", "triton", "peft", "transformers")}
        return {
            "gpu": torch.cuda.get_device_name(),
            "driver": _driver(),
            "cuda": str(torch.version.cuda),
            **known,
            "python": platform.python_version(),
            "date": datetime.date.today().isoformat(),
        }

    def write(self, name: str, rows: list[dict[str, object]]) -> None:
        """On a GPU print the rows and write them to results/gpu_<name>.csv, in the place of this GPU's old ones."""
        if self.dry:
            print(f"{len(rows)} rows of {', '.join(rows[0])}")
            return
        for row in rows:
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        machine = self.machine()
        path = RESULTS / f"gpu_{name}.csv"
        kept = []
        if path.exists():
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if row["gpu"] != machine["gpu"]]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *machine], restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows([*kept, *({**row, **machine} for row in rows)])


@contextmanager
def backend(name: str):
    """Ours, forced."""
    before = os.environ.get("LLMBUILDER_BACKEND")
    os.environ["LLMBUILDER_BACKEND"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["LLMBUILDER_BACKEND"]
        else:
            os.environ["LLMBUILDER_BACKEND"] = before


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
