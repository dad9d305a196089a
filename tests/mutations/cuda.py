"""Seeded bugs in the CUDA kernels, each of which the rung of the ladder that is named for it must see.

    python tests/mutations/cuda.py [name ...]      only bugs whose names contain one of these

For each bug the sources are copied, one passage is replaced, and the rung runs on the operator that has it, for bf16
alone. Prints what each rung said, and writes it to benchmarks/results/mutations.csv for the bugs that were tried. Exits
with 1 when one got away, or when a rung sees something in the sources as they are.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from codegen.nvcc import nvcc
from mutations.cuda_bugs import BUGS, Bug

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "benchmarks/results/mutations.csv"
CHECK = Path(__file__).with_name("check_cuda.py")
# One type of element is enough to show a bug, and compiles in a quarter of the time.
ONE_TYPE = [
    ("cuda/mma.h", "return f(MathF16());", "break;"),
    ("cuda/mma.h", "return tf32 ? f(MathTF32()) : f(MathFP32());", "break;"),
    ("cuda/elements.h", "return f(f16());", "break;"),
]
NEED_NVCC = ("ptx", "codegen")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only bugs whose names contain one of these")
    names = parser.parse_args().names
    bugs = [bug for bug in BUGS if not names or any(name in bug.name for name in names)]
    if not nvcc():
        print("no nvcc here: what the PTX interpreter and the code gates would see is left out")
        bugs = [bug for bug in bugs if bug.rung not in NEED_NVCC]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        clean = copy(Path(folder) / "clean")
        pairs = sorted({(bug.rung, bug.operator) for bug in bugs})
        for pair, said in zip(pairs, pool.map(lambda pair: run(pair[0], clean, pair[1]), pairs), strict=True):
            print(f"as they are: {pair[1]}: {pair[0]}: {said or 'nothing'}", flush=True)
            if said:
                print(f"{pair[0]} sees something in {pair[1]} without any seeded bug: {said}")
                return 1
        found = list(pool.map(lambda bug: try_bug(Path(folder), bug), bugs))
    write(bugs, found)
    missed = [bug for bug, said in zip(bugs, found, strict=True) if not said]
    print(f"{len(bugs) - len(missed)} of {len(bugs)} seen" + "".join(f"\n  missed: {bug.name}" for bug in missed))
    return 1 if missed else 0


def copy(tree: Path) -> Path:
    """csrc with kernels for bf16 (and fp32 where that costs nothing)."""
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    for file, right, wrong in ONE_TYPE:
        replace(tree / "csrc" / file, right, wrong)
    return tree / "csrc"


def try_bug(folder: Path, bug: Bug) -> str:
    tree = folder / f"{BUGS.index(bug)}"
    csrc = copy(tree)
    replace(csrc / bug.file, bug.right, bug.wrong)
    said = run(bug.rung, csrc, bug.operator)
    shutil.rmtree(tree)
    print(f"{bug.kind}: {bug.name}: {bug.rung}: {said or 'NOT SEEN'}", flush=True)
    return said


def replace(path: Path, right: str, wrong: str) -> None:
    text = path.read_text()
    if text.count(right) != 1:
        raise SystemExit(f"stands {text.count(right)} times in {path.name}, not once: {right}")
    path.write_text(text.replace(right, wrong))


def run(rung: str, csrc: Path, operator: str) -> str:
    """What the rung says, or nothing."""
    command = [sys.executable, str(CHECK), rung, str(csrc), operator]
    path = os.pathsep.join(filter(None, (str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}  # in this folder lies a triton.py
    environment |= {"LLMBUILDER_BACKEND": "cuda", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 2:
        raise SystemExit(f"{rung} could not run on {operator}:\n{done.stdout}\n{done.stderr}")
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}"
    return (done.stdout.strip() or "failed")[:200] if done.returncode else ""


def write(bugs: list[Bug], found: list[str]) -> None:
    """The table, in the order of BUGS: new rows for these bugs, the rows that stand there for the others."""
    rows = {}
    if TABLE.exists():
        with TABLE.open(newline="") as file:
            rows = {(row["kernel"], row["bug"]): row for row in csv.DictReader(file)}
    for bug, said in zip(bugs, found, strict=True):
        seen = bug.rung if said else "nobody"
        row = {"kernel": bug.kind, "bug": bug.name, "file": bug.file, "seen by": seen, "on": bug.operator}
        rows[bug.kind, bug.name] = row
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["kernel", "bug", "file", "seen by", "on"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[bug.kind, bug.name] for bug in BUGS if (bug.kind, bug.name) in rows)


if __name__ == "__main__":
    sys.exit(main())
