"""Seeded bugs in the Triton kernels, each of which the tests in the hardened interpreter must see.

    python tests/mutations/triton.py [name ...]      only bugs whose names contain one of these

For each bug kernels/ is copied, one passage is replaced, and some tests of tests/triton/interpreted run against the
copy. Prints what saw each; a run of all bugs writes benchmarks/results/mutations_triton.csv. Exits with 1 when one got
away, or when those tests fail without a bug.
"""

import csv
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).parent]  # `triton` is not this file
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/triton")]
os.environ.update(TRITON_INTERPRET="1", INTERPRETED_PROFILE="quick")

from mutations.forked import first_failure, try_bugs  # noqa: E402 - after the path is right
from mutations.triton_bugs import BUGS, Bug  # noqa: E402

TABLE = ROOT / "benchmarks/results/mutations_triton.csv"
RUNGS = {"OutOfBoundsError": "bounds", "RaceError": "races"}  # what else fails fails by a value


def main() -> int:
    return try_bugs(__doc__, BUGS, ROOT / "kernels", "llmbuilder/kernels", copy_tree, run_tests, write)


def copy_tree(tree: Path) -> Path:
    """The package by links, but kernels/ as a copy."""
    (tree / "llmbuilder").mkdir()
    for path in (ROOT / "llmbuilder").iterdir():
        if path.name not in ("kernels", "__pycache__"):
            (tree / "llmbuilder" / path.name).symlink_to(path)
    shutil.copytree(ROOT / "kernels", tree / "llmbuilder/kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tree


def run_tests(tree: Path, tests: str, which: str) -> str:
    """What the first test that fails is called and failed by, nothing when all pass."""
    name, report = first_failure(tree, ROOT / "tests/triton/interpreted" / tests, which)
    rungs = [rung for error, rung in RUNGS.items() if error in report]
    return name and f"{name}, {rungs[0] if rungs else 'value'}"


def write(bugs: list[Bug], found: list[str]) -> None:
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("kind", "bug", "file", "seen by", "rung"))
        for bug, said in zip(bugs, found, strict=True):
            test, _, rung = said.rpartition(", ")
            writer.writerow((bug.kind, bug.name, f"kernels/{bug.file}", test, rung))


if __name__ == "__main__":
    import guard  # noqa: F401 - and torch and triton with it, once, not in every child
    import hypothesis  # noqa: F401

    sys.exit(main())
