"""Whose folder it is."""

from pathlib import Path

import pytest

from llmbuilder.errors import LLMBuilderError
from llmbuilder.finetune.folder import CONTENT, RunFolder


@pytest.mark.parametrize("name", CONTENT)
def test_a_folder_with_anything_of_a_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(LLMBuilderError, match=rf"holds a run already \({name}\): go on with it by resume, replace"):
        RunFolder(tmp_path, resume=False, overwrite=False)
    RunFolder(tmp_path, resume=True, overwrite=False)
    assert (tmp_path / name).exists()


def test_beginning_replaces_the_run_and_nothing_else(tmp_path: Path) -> None:
    for name in CONTENT:
        (tmp_path / name).mkdir()
        (tmp_path / name / "inside").touch()
    (tmp_path / "notes.txt").write_text("mine")
    folder = RunFolder(tmp_path, resume=False, overwrite=True)
    assert all((tmp_path / name / "inside").exists() for name in CONTENT)  # not before training begins
    folder.begin("seed: 3\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "notes.txt"]
    assert (tmp_path / "config.yaml").read_text() == "seed: 3\n"


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(LLMBuilderError, match="is a file"):
        RunFolder(tmp_path / "run", resume=False, overwrite=True)


def test_results_are_read_back_and_damaged_ones_count_for_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, resume=False, overwrite=False)
    assert folder.results() is None
    folder.save_results({"base_perplexity": 1.5})
    assert folder.results() == {"base_perplexity": 1.5}
    (tmp_path / "results.json").write_text('{"base')
    assert folder.results() is None
