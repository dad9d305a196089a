"""Whose folder it is."""

import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmbuilder.errors import LLMBuilderError
from llmbuilder.finetune.folder import CONTENT, MARK, RunFolder
from llmbuilder.finetune.past import Past
from llmbuilder.finetune.results import Results


@pytest.mark.parametrize("name", CONTENT)
def test_a_folder_with_anything_of_a_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(LLMBuilderError, match=rf"holds a run already \({name}\): go on with it by resume, replace"):
        RunFolder(tmp_path, resume=False, overwrite=False)
    if name != "config.yaml":
        (tmp_path / "config.yaml").write_text(MARK)
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


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_what_no_run_has_written_is_spared(tmp_path: Path, how: str) -> None:
    asked = {"resume": False, "overwrite": False} | {how: True}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "theirs").touch()
    with pytest.raises(LLMBuilderError, match=r"holds model, and no config\.yaml .* give another folder"):
        RunFolder(tmp_path, **asked)
    assert (tmp_path / "model" / "theirs").exists()
    (tmp_path / "config.yaml").write_text("seed: 3\n")  # someone's, with the name that ours has
    with pytest.raises(LLMBuilderError, match="that a run would have written"):
        RunFolder(tmp_path, **asked)
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
    wanted = Results(1.5, 1.2, 20.0, timedelta(seconds=3), "validation", 4, 4, [{"step": 1}])
    folder = RunFolder(tmp_path, resume=False, overwrite=False)
    assert folder.results([]) is None
    folder.save_results(wanted.to_dict())
    assert folder.results([]) is None  # a run that was over has an adapter or a model, and a past
    (tmp_path / "adapter").mkdir()
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({"a": torch.ones(64)}, weights)
    assert folder.results([]) is None
    Past().save(folder.past)
    assert folder.results([{"step": 1}]) == wanted
    state = folder.past / "state.json"
    for file in (weights, state):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        assert folder.results([]) is None
        file.write_bytes(whole)
    null = json.dumps(wanted.to_dict() | {"final_perplexity": None})
    for damaged in ('{"base', "[]", "{}", '{"base_perplexity": 1.5}', null, null.replace("null", '"much"')):
        (tmp_path / "results.json").write_text(damaged)
        assert folder.results([]) is None
