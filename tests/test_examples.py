"""The examples: each script runs, its YAML file says the same, and its line for the command line does the same."""

import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llmbuilder.cli import main
from llmbuilder.finetune import FineTuningConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "prepare")
pytestmark = pytest.mark.filterwarnings("ignore:no validation data", "ignore:no general_dataset")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder to run in, with the examples in their place and hardly any data."""
    path = tmp_path_factory.mktemp("examples")
    (path / "examples").symlink_to(EXAMPLES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(str(EXAMPLES))
        prepare = __import__("prepare")
        patch.setattr(prepare, "STEPS", 2)
        patch.setattr(prepare, "COUNT", 15)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield path
        torch.set_num_threads(threads)
    sys.modules.pop("prepare", None)


def line_of(name: str) -> list[str]:
    """The words of the command that the script's text gives."""
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").replace("\\\\\n", " ").replace("\\\n", " ")
    found = re.search(r"^    llmbuilder (finetune model .*)$", text, re.MULTILINE)
    assert found, f"examples/{name}.py gives no command"
    return shlex.split(found[1])


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_runs_and_its_file_and_command_say_the_same(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variables = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.search(r"\d", last), "it ends with a figure"
    config = FineTuningConfig.from_yaml(EXAMPLES / f"{name}.yaml")
    assert config == variables["config"]
    words = line_of(name)
    assert f"examples/{name}.yaml" in words
    assert main([*words, "--output", f"{folder}/run-{name}", "--max-steps", "1"]) == 0
    assert "Perplexity on" in capsys.readouterr().out


def test_every_example_is_listed(folder: Path) -> None:
    listed = re.findall(r"\(([a-z0-9_]+)\.py\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == SCRIPTS and len(SCRIPTS) >= 9
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == set(SCRIPTS)
    assert isinstance(sys.modules["prepare"], ModuleType)
