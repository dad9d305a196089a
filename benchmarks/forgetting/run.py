"""What methods against forgetting keep (`make bench-forgetting`).

    python benchmarks/forgetting/run.py [digits] [native] [smollm2]     default: digits and native
    python benchmarks/forgetting/run.py --search NAME                   choose the settings anew
    python benchmarks/forgetting/run.py --only METHOD … -- NAME         of these alone; the others stay as they are
    python benchmarks/forgetting/run.py --small NAME                    a quick look whether it runs

Five seeds (SmolLM2: one), mean and standard deviation into results/forgetting-NAME.csv, and a picture beside it. The
settings are those of settings.json, which `--search` chose on seeds that are not reported, from the grids in digits.py
and language.py: the best of those that learn the last task about as well as plain training does.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from harness import RESULTS, read, write  # noqa: E402

SETTINGS = HERE / "settings.json"
SEEDS = {"digits": 5, "native": 5, "smollm2": 1}
SEARCH_SEEDS = {"digits": (1000, 1001, 1002), "native": (1000,), "smollm2": (1000,)}
# SmolLM2 takes over what was found for the native model where no search of its own, hours long, was run.
TAKES_OVER = {"smollm2": "native"}
# What a method is for: the measure that it is chosen by, and whether that should be high.
AIMS = {"kl": ("drift", False)}
EARLIER = ("earlier", True)

Job = tuple[str, str, str, dict[str, Any], int, bool]  # benchmark, kind, method, settings, seed, small


def main() -> None:
    parser = argparse.ArgumentParser(prog="forgetting", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*SEEDS, []], metavar="name")
    parser.add_argument("--search", action="store_true", help="choose the settings, on seeds of their own")
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD", help="search or report these methods alone")
    parser.add_argument("--small", action="store_true", help="hardly any data, one seed; nothing is written")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes, a thread each")
    args = parser.parse_args()
    for name in args.names or ("digits", "native"):
        start = time.perf_counter()
        (search if args.search else report)(name, args.workers, args.small, args.only)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


def report(name: str, workers: int, small: bool, only: list[str]) -> None:
    """Every method with its settings, over the seeds."""
    chosen = settings_of(name)
    seeds = range(1 if small else SEEDS[name])
    jobs = [
        (name, kind, method, chosen.get(kind, {}).get(method, {}), seed, small)
        for kind in kinds(name)
        for method in only or methods(name)
        for seed in seeds
    ]
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for job, measures in run_all(jobs, workers):
        found.setdefault((job[1], job[2]), []).append(measures)
    rows: list[dict[str, Any]] = [
        {
            "kind": kind,
            "method": method,
            "settings": json.dumps(chosen.get(kind, {}).get(method, {})),
            "seeds": len(seeds),
        }
        | {column: value for measure in measured[0] for column, value in mean_and_deviation(measure, measured)}
        for (kind, method), measured in found.items()
    ]
    if small:
        return
    rows += [row for row in read(f"forgetting-{name}") if only and row["method"] not in only]
    rows.sort(key=lambda row: order(name, (row["kind"], row["method"])))
    write(f"forgetting-{name}", rows)
    draw(name, rows)


def settings_of(name: str) -> dict[str, dict[str, Any]]:
    """The chosen settings, by kind and method."""
    found = json.loads(SETTINGS.read_text())
    if name not in found and TAKES_OVER.get(name) not in found:
        raise SystemExit(f"no settings are chosen for {name} yet: run.py --search {name}")
    own, others = found.get(name, {}), found.get(TAKES_OVER.get(name), {})
    return {kind: others.get(kind, {}) | own.get(kind, {}) for kind in kinds(name)}


def search(name: str, workers: int, small: bool, only: list[str]) -> None:
    """Choose each method's settings: of those that match plain training on the last task, the best for its aim."""
    grids = {method: grid for method, grid in module(name).grid(name).items() if not only or method in only}
    jobs = [
        (name, kind, method, settings, seed, small)
        for kind in kinds(name)
        for method, grid in {"none": [{}], **grids}.items()
        for settings in grid
        for seed in SEARCH_SEEDS[name]
    ]
    found: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for job, measures in run_all(jobs, workers):
        found.setdefault((job[1], job[2], json.dumps(job[3])), []).append(measures)
    means = {key: {m: float(np.mean([run[m] for run in runs])) for m in runs[0]} for key, runs in found.items()}
    chosen = {
        kind: {
            method: best(
                name,
                [(settings, means[kind, method, json.dumps(settings)]) for settings in grid],
                plain=means[kind, "none", "{}"]["last"],
                aim=AIMS.get(method, EARLIER),
            )
            for method, grid in grids.items()
        }
        for kind in kinds(name)
    }
    print(json.dumps(chosen, indent=2))
    if not small:
        everything = json.loads(SETTINGS.read_text()) if SETTINGS.exists() else {}
        before = everything.get(name, {})
        chosen = {kind: before.get(kind, {}) | found for kind, found in chosen.items()}
        SETTINGS.write_text(json.dumps(everything | {name: chosen}, indent=2, sort_keys=True) + "\n")


def best(
    name: str, tried: list[tuple[dict[str, Any], dict[str, float]]], plain: float, aim: tuple[str, bool]
) -> dict[str, Any]:
    """The settings with the best aim among those whose last task is matched; where none is, the nearest to it."""
    measure, high = aim
    matched = [(settings, found) for settings, found in tried if module(name).is_matched(found["last"], plain)]
    if not matched:
        return min(tried, key=lambda pair: abs(pair[1]["last"] - plain))[0]
    return max(matched, key=lambda pair: pair[1][measure] * (1 if high else -1))[0]


def run_all(jobs: list[Job], workers: int) -> Iterable[tuple[Job, dict[str, float]]]:
    """Each job with its measures, as they come; workers are processes of one thread."""
    if any(name != "digits" for name, *_ in jobs):
        import language

        for name in {job[0] for job in jobs}:
            language.base(name)  # made once, before the workers look for it
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for job, measures in pool.imap_unordered(run, jobs):
            name, kind, method, settings, seed, _ = job
            text = "  ".join(f"{measure} {value:.3f}" for measure, value in measures.items())
            print(f"{name} {kind} {method} {settings or ''} seed {seed}:  {text}", flush=True)
            yield job, measures


def run(job: Job) -> tuple[Job, dict[str, float]]:
    """One run, in a worker."""
    import torch

    name, kind, method, settings, seed, small = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.stderr = open(os.devnull, "w")  # the tuner's progress  # noqa: SIM115
    return job, module(name).measure(name, kind, method, settings, seed, small)


def module(name: str) -> Any:
    import digits
    import language

    return digits if name == "digits" else language


def kinds(name: str) -> tuple[str, ...]:
    return module(name).KINDS


def methods(name: str) -> tuple[str, ...]:
    return module(name).METHODS


def order(name: str, key: tuple[str, str]) -> tuple[int, int]:
    return kinds(name).index(key[0]), methods(name).index(key[1])


def mean_and_deviation(measure: str, runs: list[dict[str, float]]) -> list[tuple[str, float]]:
    values = np.array([run[measure] for run in runs])
    deviation = values.std(ddof=1) if len(values) > 1 else 0.0
    return [(measure, round(float(values.mean()), 4)), (f"{measure} sd", round(float(deviation), 4))]


def draw(name: str, rows: list[dict[str, Any]]) -> None:
    """A panel for each measure that counts, a group of bars for each kind of training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = module(name).PANELS
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    for place, (measure, label) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), place, ylabel=label)
        for number, kind in enumerate(kinds(name)):
            bars = [row for row in rows if row["kind"] == kind]
            width = 0.8 / len(kinds(name))
            at = [i + (number - (len(kinds(name)) - 1) / 2) * width for i in range(len(bars))]
            heights, deviations = ([float(bar[column]) for bar in bars] for column in (measure, f"{measure} sd"))
            axes.bar(at, heights, width, yerr=deviations, label=kind, capsize=2)
            axes.set_xticks(range(len(bars)), [bar["method"] for bar in bars], rotation=30)
        axes.grid(axis="y", alpha=0.3)
        if len(kinds(name)) > 1:
            axes.legend()
    FigureCanvasAgg(figure).print_png(RESULTS / f"forgetting-{name}.png")


if __name__ == "__main__":
    main()
