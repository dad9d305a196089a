"""Imports run leftwards only, as docs/design.md lays the layers out; and what must be light does not load torch."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# docs/design.md, "Layers". A module may import from its own part and from those of lower rank.
RANKS = {
    "errors": 0,
    "_version": 0,
    "turns": 0,
    "_gpu": 1,
    "kernels": 2,
    "_C": 2,
    "ops": 3,
    "models": 4,
    "data": 4,
    "nn": 5,
    "methods": 6,
    "finetune": 7,
    "integrations": 8,
    "report": 8,
    "doctor": 8,
    "cli": 9,
    "__main__": 10,
}
SOURCES = sorted(path for folder in ("llmbuilder", "kernels") for path in (ROOT / folder).rglob("*.py"))
SOURCES = [path for path in SOURCES if not path.is_relative_to(ROOT / "llmbuilder" / "kernels")]  # a link to kernels/


def module_name(path: Path) -> list[str]:
    """The dotted name, in parts: kernels/ is installed as llmbuilder.kernels."""
    parts = [*path.relative_to(ROOT).with_suffix("").parts]
    return ["llmbuilder", *parts] if parts[0] == "kernels" else parts


def imports(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Line and absolute name of every import that runs, wherever it stands; those for type checkers alone do not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield node.lineno, [*module, alias.name]
        else:
            yield from imports(node, package)


def own_imports(path: Path) -> list[tuple[int, list[str]]]:
    """The imports of `path` that stay inside llmbuilder."""
    name = module_name(path)
    package = name[:-1]
    found = imports(ast.parse(path.read_text(encoding="utf-8")), package)
    return [(line, target) for line, target in found if target[0] == "llmbuilder"]


def wrong_imports(path: Path) -> list[str]:
    part = module_name(path)[1]
    if part == "__init__":
        return []  # the front door imports on first use
    wrong = []
    for line, target in own_imports(path):
        other = target[1]
        if other == part or (part == "ops" and other in ("_C", "kernels")):
            continue
        if other not in RANKS or RANKS[other] >= RANKS[part]:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {'.'.join(target)}")
    return wrong


def test_every_part_has_a_rank():
    assert {module_name(path)[1] for path in SOURCES} - {"__init__"} <= set(RANKS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_leftwards_only(path):
    assert wrong_imports(path) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_native_imports_the_extension_and_only_ops_the_kernels(path):
    name = ".".join(module_name(path))
    for line, target in own_imports(path):
        place = f"{path.relative_to(ROOT)}:{line}"
        assert "_C" not in target or name == "llmbuilder.ops._native", place
        assert target[1] != "kernels" or module_name(path)[1] in ("ops", "kernels"), place


def test_a_wrong_import_would_be_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "llmbuilder" / "ops" / "bad.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from . import reference\nfrom ..errors import nearest\ndef f():\n    from ..nn import heads\n"
        "if TYPE_CHECKING:\n    from ..cli import main\n"
    )
    assert wrong_imports(path) == ["llmbuilder/ops/bad.py:4 imports llmbuilder.nn.heads"]


LIGHT = {
    "import llmbuilder": "import llmbuilder",
    "import llmbuilder.cli": "import llmbuilder.cli",
    "llmbuilder --help": "from llmbuilder.cli import main; main(['--help'])",
    "llmbuilder --version": "from llmbuilder.cli import main; main(['--version'])",
    "a wrong command": "from llmbuilder.cli import main; main(['chta'])",
}
COMMANDS = ("finetune model", "chat", "generate", "evaluate", "merge", "doctor")
LIGHT_COMMANDS = {f"{c} --help": f"from llmbuilder.cli import main; main({[*c.split(), '--help']})" for c in COMMANDS}


def modules_loaded_by(statement: str) -> list[str]:
    """The top-level packages that a fresh interpreter has loaded after the statement."""
    report = "import sys, json; print('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    command = [sys.executable, "-P", "-c", f"{statement}\n{report}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("statement", LIGHT.values(), ids=LIGHT)
def test_what_is_asked_most_loads_nothing_heavy(statement):
    assert not {"torch", "transformers", "numpy", "pydantic", "rich", "yaml"} & set(modules_loaded_by(statement))


@pytest.mark.parametrize("statement", LIGHT_COMMANDS.values(), ids=LIGHT_COMMANDS)
def test_help_of_a_command_loads_no_torch(statement):
    assert not {"torch", "transformers", "numpy"} & set(modules_loaded_by(statement))
