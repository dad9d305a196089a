"""What ends a run, or keeps one from starting: nothing is lost, and a damaged end is made again."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from llmbuilder.errors import ConfigError, LLMBuilderError
from llmbuilder.finetune import FineTuner

pytestmark = pytest.mark.filterwarnings("ignore:no validation data")
Make = Callable[..., Any]
LORA = {"use_lora": True, "lora_rank": 2}


@pytest.fixture
def make(make_gpt: Make, make_examples: Make, make_config: Make, tmp_path: Path) -> Make:
    """A short run of LoRA into ``tmp_path/run``."""

    def run(seed: int = 0, folder: str = "run", val: Any = None, config: Any = (), **how: Any) -> FineTuner:
        settings = LORA | {"output_dir": tmp_path / folder, "save_every": 2, "max_steps": 3} | dict(config)
        return FineTuner(make_gpt(seed), make_examples(8), val or make_examples(3), make_config(**settings), **how)

    return run


def held(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_that_is_over_is_not_begun_again_where_its_checkpoints_are_gone(make: Make, tmp_path: Path) -> None:
    make().train()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = held(tmp_path / "run")
    with pytest.raises(
        LLMBuilderError, match=r"holds a run that is over, and no whole checkpoint .* overwrite replaces"
    ):
        make(config={"learning_rate": 0.5}, resume=True).train()
    assert held(tmp_path / "run") == before


def test_a_run_that_cannot_start_replaces_none(make: Make, tmp_path: Path) -> None:
    """The model diverges before its first step: seen when it is judged."""
    make().train()
    before = held(tmp_path / "run")
    tuner = make(overwrite=True)
    tuner.judge.score = lambda _: (_ for _ in ()).throw(ConfigError("no task is called so"))
    with pytest.raises(ConfigError, match="no task"):
        tuner.train()
    assert held(tmp_path / "run") == before


@pytest.mark.parametrize("damaged", ["adapter/adapter_model.safetensors", "past/state.json", "results.json"])
def test_a_damaged_end_is_made_again_from_the_last_checkpoint(make: Make, tmp_path: Path, damaged: str) -> None:
    results = make().train()
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    weights = {name: value.clone() for name, value in weights.items()}  # load_file maps the file
    file = tmp_path / "run" / damaged
    file.write_bytes(file.read_bytes()[:100])
    again = make(resume=True).train()
    assert again.final_perplexity == results.final_perplexity
    found = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    make(folder="next", continue_from=tmp_path / "run").train()


def test_a_run_that_was_killed_while_it_wrote_is_not_gone_on_from(make: Make, tmp_path: Path) -> None:
    make().train()
    (tmp_path / "run" / "results.json").unlink()  # the last file of a run
    with pytest.raises(LLMBuilderError, match="no run has come to its end there; finish it by resume"):
        make(folder="next", continue_from=tmp_path / "run")


def test_an_adapter_is_not_gone_on_with_beside_another_base(make: Make, tmp_path: Path) -> None:
    make().train()
    with pytest.raises(ConfigError, match="its adapter was trained on another model; load that one"):
        make(seed=1, folder="next", continue_from=tmp_path / "run")


def test_end_task_leaves_the_past_of_a_run_that_is_over(make: Make, tmp_path: Path) -> None:
    """Before train() the model is not what the run left: its past would be that of an untrained one."""
    make().train()
    before = held(tmp_path / "run")
    with pytest.raises(LLMBuilderError, match=r"end_task before train\(\)"):
        make(resume=True).end_task("films")
    make(overwrite=True).end_task("films")
    assert held(tmp_path / "run") == before


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["python", "safetensors"],
)
def test_a_full_disk_is_named_where_the_adapter_is_written(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    tuner = make()

    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("llmbuilder.nn.peft_format.save_file", refuse)
    with pytest.raises(LLMBuilderError, match=r"run: cannot be saved .*No space left on device.*free some space, then"):
        tuner.train()
    monkeypatch.undo()
    make(resume=True).train()
    assert (tmp_path / "run" / "results.json").exists()


def test_resume_does_not_take_someones_folder_for_a_run(make: Make, tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "theirs").write_text("mine")
    with pytest.raises(LLMBuilderError, match=r"holds model, and no config\.yaml that a run would have written"):
        make(resume=True)
    assert (tmp_path / "run" / "model" / "theirs").read_text() == "mine"


def test_a_model_that_has_the_adapter_already_is_told_what_to_do(make_gpt: Make, make: Make) -> None:
    tuner = make()
    with pytest.raises(ConfigError, match="has an adapter 'default' already: load the model anew, or go on with"):
        FineTuner(tuner.model, tuner.run.sources["train"], None, tuner.config, overwrite=True)


def test_the_dropout_that_a_next_task_trains_with_is_in_its_adapter(make: Make, tmp_path: Path) -> None:
    make(config={"lora_dropout": 0.2}).train()
    make(folder="next", config={"lora_dropout": 0.4}, continue_from=tmp_path / "run").train()
    assert '"lora_dropout": 0.4' in (tmp_path / "next" / "adapter" / "adapter_config.json").read_text()
