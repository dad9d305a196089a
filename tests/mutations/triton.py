"""Seeded bugs in the Triton kernels, each of which the tests in the hardened interpreter must see.

    python tests/mutations/triton.py [name ...]      only bugs whose names contain one of these

For each bug kernels/ is copied, one passage is replaced, and some tests of tests/triton/interpreted run against the
copy. Prints what saw each; a run of all bugs writes benchmarks/results/mutations_triton.csv. Exits with 1 when one got
away, or when those tests fail without a bug.
"""

import argparse
import csv
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).parent]  # `triton` is not this file
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/triton")]
os.environ.update(TRITON_INTERPRET="1", INTERPRETED_PROFILE="quick")

from mutations.forked import first_failure  # noqa: E402 - after the path is right
from mutations.triton_bugs import BUGS, Bug  # noqa: E402

TABLE = ROOT / "benchmarks/results/mutations_triton.csv"
RUNGS = {"OutOfBoundsError": "bounds", "RaceError": "races"}  # what else fails fails by a value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only bugs whose names contain one of these")
    names = parser.parse_args().names
    bugs = [bug for bug in BUGS if not names or any(name in bug.name for name in names)]
    for bug in bugs:
        replaced(bug)  # a stale one ends the run at once
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder))
        for tests in sorted({bug.tests for bug in bugs}):
            which = " or ".join(sorted({bug.which for bug in bugs if bug.tests == tests}))
            if said := run_tests(tree, tests, which):
                print(f"{tests} -k '{which}' fails without any seeded bug: {said}")
                return 1
        found = [try_bug(tree, bug) for bug in bugs]
    if not names:
        write(bugs, found)
    missed = [bug.name for bug, said in zip(bugs, found, strict=True) if not said]
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(bug.kind for bug in bugs).items())
    print(f"{len(bugs) - len(missed)} of {len(bugs)} seen ({kinds})" + "".join(f"\n  missed: {n}" for n in missed))
    return 1 if missed else 0


def copy_tree(tree: Path) -> Path:
    """The package by links, but kernels/ as a copy."""
    (tree / "llmbuilder").mkdir()
    for path in (ROOT / "llmbuilder").iterdir():
        if path.name not in ("kernels", "__pycache__"):
            (tree / "llmbuilder" / path.name).symlink_to(path)
    shutil.copytree(ROOT / "kernels", tree / "llmbuilder/kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tree


def replaced(bug: Bug) -> str:
    text = (ROOT / "kernels" / bug.file).read_text()
    if text.count(bug.right) != 1:
        raise SystemExit(f"{bug.file}: stands {text.count(bug.right)} times there, not once: {bug.right}")
    return text.replace(bug.right, bug.wrong)


def try_bug(tree: Path, bug: Bug) -> str:
    path = tree / "llmbuilder/kernels" / bug.file
    right = path.read_text()
    path.write_text(replaced(bug))
    said = run_tests(tree, bug.tests, bug.which)
    path.write_text(right)
    print(f"{bug.kind}: {bug.name}: {said or 'NOT SEEN'}", flush=True)
    return said


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
