"""What the benchmarks share: interleaved timing, medians, result files that name machine, versions and date.

Every benchmark checks that its competitors compute the same before it times them, and times them in turn within one
process (or in processes that step in turn), so that drift of the machine hits all alike.

malloc is part of the measurement: glibc hands large blocks back at every free, and the page faults of the next
allocation can cost as much as a kernel. So everything is measured twice, with malloc keeping its memory (`keep`) and as
it is (`system`), the same mode for all competitors. The mode is set by the environment before Python starts.
"""

import csv
import datetime
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**36)}
MODES = ("keep", "system")


def environment(malloc: str) -> dict[str, str]:
    """The environment of a child process in which malloc keeps its memory, or does as it is."""
    clean = {k: v for k, v in os.environ.items() if k not in KEEP}
    return {**clean, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", **(KEEP if malloc == "keep" else {})}


def malloc_mode() -> str:
    return "keep" if os.environ.get("MALLOC_TRIM_THRESHOLD_") == KEEP["MALLOC_TRIM_THRESHOLD_"] else "system"


def interleaved(functions: dict[str, Callable[[], object]], repeats: int, warmup: int = 2, inner: int = 1) -> dict:
    """Seconds per call of each function, a list each. Every repeat runs them all, each time in another order."""
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(warmup):
        for name in names:
            functions[name]()
    for i in range(repeats):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            for _ in range(inner):
                functions[name]()
            times[name].append((time.perf_counter() - start) / inner)
    return times


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the repeats of slow/fast: each repeat is a pair measured side by side."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def relative(got, want) -> float:
    """Relative error in the Frobenius norm, in fp64."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def machine() -> dict[str, object]:
    """Columns that every result row carries."""
    import torch

    versions = {name: version(name) for name in ("llmbuilder", "torch", "peft", "transformers")}
    return {
        "malloc": malloc_mode(),
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        **versions,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def version(package: str) -> str:
    from importlib import metadata

    return metadata.version(package)


def cpu_name() -> str:
    """Model name and the vector extensions that matter here."""
    try:
        info = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    flags = [flag for flag in wanted if flag in fields.get("flags", "").split()]
    return f"{fields.get('model name', platform.processor())} ({' '.join(flags)})"


def write(name: str, rows: Iterable[dict[str, object]]) -> pathlib.Path:
    """Replace this malloc mode's rows in results/<name>.csv, keep the other mode's; print the new ones."""
    rows = [{**row, **(machine() | row)} for row in rows]  # those that were measured before keep where and when
    path = RESULTS / f"{name}.csv"
    kept = [row for row in read(name) if row["malloc"] != malloc_mode()]
    RESULTS.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), extrasaction="ignore", restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows + kept, key=lambda row: str(row["malloc"])))
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items() if key not in machine()), flush=True)
    return path


def read(name: str) -> list[dict[str, str]]:
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run_all_modes(script: str, *arguments: str) -> None:
    """Run a benchmark once in each malloc mode, as a process of its own."""
    for mode in MODES:
        print(f"== {pathlib.Path(script).stem} {' '.join(arguments)} (malloc: {mode})", flush=True)
        subprocess.run([sys.executable, script, *arguments], env=environment(mode), check=True)
