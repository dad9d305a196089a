"""Seeded bugs in the methods against forgetting, each of which a test must see.

    python tests/mutations/methods.py [name ...]      only bugs whose names contain one of these

For each bug methods/ and finetune/ of the installed package are copied, one passage is replaced, and some tests of
tests/methods or tests/finetune run against the copy. Prints what saw each; a run of all bugs writes
benchmarks/results/mutations_methods.csv. Exits with 1 when one got away, or when those tests fail without a bug.
"""

import csv
import shutil
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).parent]  # its triton.py is none
sys.path[:0] = [str(ROOT / "tests")]

from mutations.forked import first_failure, try_bugs  # noqa: E402 - after the path is right
from mutations.methods_bugs import BUGS, Bug  # noqa: E402

PACKAGE = Path(find_spec("llmbuilder").origin).parent
TABLE = ROOT / "benchmarks/results/mutations_methods.csv"
COPIED = ("methods", "finetune")
ANEW = tuple(f"llmbuilder.{name}" for name in COPIED)


def main() -> int:
    return try_bugs(__doc__, BUGS, PACKAGE, "llmbuilder", copy_tree, run_tests, write)


def copy_tree(tree: Path) -> Path:
    """The package by links, but what gets bugs as a copy."""
    (tree / "llmbuilder").mkdir()
    for path in PACKAGE.iterdir():
        if path.name in COPIED:
            shutil.copytree(path, tree / "llmbuilder" / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.name != "__pycache__":
            (tree / "llmbuilder" / path.name).symlink_to(path)
    preload(tree)
    return tree


def preload(tree: Path) -> None:
    """Import once what every child needs: the package from the copy, and what is slow in torch and transformers."""
    sys.path.insert(0, str(tree))
    for name in ("llmbuilder.finetune.tuner", "torch._dynamo", "torch.utils.tensorboard", "transformers"):
        import_module(name)
    for name in ("GPT2LMHeadModel", "LlamaForCausalLM", "GPTNeoXForCausalLM", "MixtralForCausalLM"):
        getattr(sys.modules["transformers"], name)


def run_tests(tree: Path, tests: str, which: str) -> str:
    """What the first test that fails is called, nothing when all pass."""
    return first_failure(tree, ROOT / "tests" / tests, which, ANEW)[0]


def write(bugs: list[Bug], found: list[str]) -> None:
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("kind", "bug", "file", "seen by"))
        for bug, said in zip(bugs, found, strict=True):
            writer.writerow((bug.kind, bug.name, f"llmbuilder/{bug.file}", said))


if __name__ == "__main__":
    sys.exit(main())
