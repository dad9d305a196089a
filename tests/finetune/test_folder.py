"""Whose folder it is."""

from datetime import timedelta
from pathlib import Path

import pytest

from llmbuilder.errors import LLMBuilderError
from llmbuilder.finetune.folder import CONTENT, MARK, RunFolder
from llmbuilder.finetune.results import Results


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
    (tmp_path / "config.yaml" / "inside").unlink()
    (tmp_path / "config.yaml").rmdir()
    (tmp_path / "config.yaml").write_text(MARK + "seed: 2\n")
    folder = RunFolder(tmp_path, resume=False, overwrite=True)
    kept = [name for name in CONTENT if name != "config.yaml"]
    assert all((tmp_path / name / "inside").exists() for name in kept)  # not before training begins
    folder.begin("seed: 3\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "notes.txt"]
    assert (tmp_path / "config.yaml").read_text() == MARK + "seed: 3\n"


def test_overwriting_spares_what_no_run_has_written(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "theirs").touch()
    with pytest.raises(LLMBuilderError, match=r"holds model, and no config\.yaml .* give another folder"):
        RunFolder(tmp_path, resume=False, overwrite=True)
    assert (tmp_path / "model" / "theirs").exists()
    (tmp_path / "config.yaml").write_text("seed: 3\n")  # someone's, with the name that ours has
    with pytest.raises(LLMBuilderError, match="that a run would have written"):
        RunFolder(tmp_path, resume=False, overwrite=True)
    assert (tmp_path / "model" / "theirs").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = RunFolder(tmp_path / "file" / "run", resume=False, overwrite=False)
    with pytest.raises(LLMBuilderError, match=r"run: cannot be made \(Not a directory\); give another folder"):
        folder.begin("seed: 3\n")


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(LLMBuilderError, match="is a file"):
        RunFolder(tmp_path / "run", resume=False, overwrite=True)


def test_results_count_where_they_are_whole_and_what_was_trained_is_there(tmp_path: Path) -> None:
    values = Results(1.5, 1.2, 20.0, timedelta(seconds=3), "validation", 4, 4, []).to_dict()
    folder = RunFolder(tmp_path, resume=False, overwrite=False)
    assert folder.results() is None
    folder.save_results(values)
    assert folder.results() is None  # a run that was over has an adapter or a model, and a past
    (tmp_path / "adapter").mkdir()
    assert folder.results() is None
    folder.past.mkdir()
    assert folder.results() == values
    for damaged in ('{"base', "[]", "{}", '{"base_perplexity": 1.5}'):
        (tmp_path / "results.json").write_text(damaged)
        assert folder.results() is None
