"""Seeded bugs in the methods against forgetting, each of which a test must see.

    python tests/mutations/methods.py [name ...]      only bugs whose names contain one of these

For each bug methods/ and finetune/ of the installed package are copied, one passage is replaced, and some tests of
tests/methods or tests/finetune run against the copy. Prints what saw each; a run of all bugs writes
benchmarks/results/mutations_methods.csv. Exits with 1 when one got away, or when those tests fail without a bug.
"""

import argparse
import csv
import shutil
import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).parent]  # its triton.py is none
sys.path[:0] = [str(ROOT / "tests")]

from mutations.forked import first_failure  # noqa: E402 - after the path is right
from mutations.methods_bugs import BUGS, Bug  # noqa: E402

PACKAGE = Path(find_spec("llmbuilder").origin).parent
TABLE = ROOT / "benchmarks/results/mutations_methods.csv"
COPIED = ("methods", "finetune")
ANEW = tuple(f"llmbuilder.{name}" for name in COPIED)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only bugs whose names contain one of these")
    names = parser.parse_args().names
    bugs = [bug for bug in BUGS if not names or any(name in bug.name for name in names)]
    for bug in bugs:
        replaced(bug)  # a stale one ends the run at once
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder))
        preload(tree)
        for tests in sorted({bug.tests for bug in bugs}):
            which = " or ".join(sorted({bug.which for bug in bugs if bug.tests == tests}))
            if said := first_failure(tree, ROOT / "tests" / tests, which, ANEW)[0]:
                print(f"{tests} -k '{which}' fails without any seeded bug: {said}")
                return 1
        found = [try_bug(tree, bug) for bug in bugs]
    if not names:
        write(bugs, found)
    missed = [bug.name for bug, said in zip(bugs, found, strict=True) if not said]
    print(f"{len(bugs) - len(missed)} of {len(bugs)} seen" + "".join(f"\n  missed: {name}" for name in missed))
    return 1 if missed else 0


def copy_tree(tree: Path) -> Path:
    """The package by links, but what gets bugs as a copy."""
    (tree / "llmbuilder").mkdir()
    for path in PACKAGE.iterdir():
        if path.name in COPIED:
            shutil.copytree(path, tree / "llmbuilder" / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.name != "__pycache__":
            (tree / "llmbuilder" / path.name).symlink_to(path)
    return tree


def preload(tree: Path) -> None:
    """Import once what every child needs: the package from the copy, and what is slow in torch and transformers."""
    sys.path.insert(0, str(tree))
    for name in ("llmbuilder.finetune.tuner", "torch._dynamo", "torch.utils.tensorboard", "transformers"):
        import_module(name)
    for name in ("GPT2LMHeadModel", "LlamaForCausalLM", "GPTNeoXForCausalLM", "MixtralForCausalLM"):
        getattr(sys.modules["transformers"], name)


def replaced(bug: Bug) -> str:
    text = (PACKAGE / bug.file).read_text()
    if text.count(bug.right) != 1:
        raise SystemExit(f"{bug.file}: stands {text.count(bug.right)} times there, not once: {bug.right}")
    return text.replace(bug.right, bug.wrong)


def try_bug(tree: Path, bug: Bug) -> str:
    path = tree / "llmbuilder" / bug.file
    right = path.read_text()
    path.write_text(replaced(bug))
    said, _ = first_failure(tree, ROOT / "tests" / bug.tests, bug.which, ANEW)
    path.write_text(right)
    print(f"{bug.kind}: {bug.name}: {said or 'NOT SEEN'}", flush=True)
    return said


def write(bugs: list[Bug], found: list[str]) -> None:
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("kind", "bug", "file", "seen by"))
        for bug, said in zip(bugs, found, strict=True):
            writer.writerow((bug.kind, bug.name, f"llmbuilder/{bug.file}", said))


if __name__ == "__main__":
    sys.exit(main())
