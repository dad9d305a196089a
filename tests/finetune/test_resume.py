"""A run that was cut off and resumed equals one that never stopped, bit for bit."""

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmbuilder.errors import ConfigError
from llmbuilder.finetune import FineTuner, Results
from llmbuilder.finetune.checkpoint import newest_checkpoint

sys.path.insert(0, str(Path(__file__).parent))
import crashing

STEPS = 12
LORA = {"use_lora": True, "lora_rank": 4, "lora_dropout": 0.2, "dropout_rate": None, "optimizer": "adamw"}


def outcome(folder: Path, lora: bool = False) -> dict[str, Any]:
    """All that a run leaves that should not depend on when it was cut off."""
    name = "adapter/adapter_model.safetensors" if lora else "model/model.safetensors"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((folder / "results.json").read_text())
    return {
        "weights": load_file(folder / name),
        "rows": [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in rows],
        "results": {key: value for key, value in results.items() if key != "training_time"},
        "last": load_file(folder / "checkpoints" / f"step-{STEPS}" / "optimizer.safetensors"),
    }


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for part in ("weights", "last"):
        assert found[part].keys() == wanted[part].keys()
        different = [name for name, value in wanted[part].items() if not torch.equal(found[part][name], value)]
        assert different == []
    assert found["rows"] == wanted["rows"]
    assert found["results"] == wanted["results"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    results = crashing.train(folder)
    assert results.steps == STEPS
    return folder


def stopped_after(whole: Path, folder: Path, step: int) -> Path:
    """The folder as a run leaves it that is killed between two saves: files are further on than the checkpoint."""
    shutil.copytree(whole, folder)
    for name in ("results.json", "loss.png", "model", "adapter"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in (folder / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    return folder


@pytest.fixture(scope="module")
def processes() -> crashing.Processes:
    return crashing.Processes()


# Twenty kills; each run goes on from what the last one left


@pytest.mark.parametrize("chain", [0, 1])
def test_killed_four_times_inside_saves(whole: Path, tmp_path: Path, processes: crashing.Processes, chain: int) -> None:
    draw = random.Random(chain)
    operations = [draw.randint(1, 14) for _ in range(4)]
    codes = [processes.run(crashing.train_until_saving, tmp_path / "run", number) for number in operations]
    assert codes == [-9] * 4
    crashing.train(tmp_path / "run", resume=True)
    assert_same(outcome(tmp_path / "run"), outcome(whole))


@pytest.mark.parametrize("lora", [False, True])
def test_killed_six_times_at_random_moments(
    whole: Path, tmp_path: Path, processes: crashing.Processes, lora: bool
) -> None:
    settings = LORA if lora else {}
    wanted, calls = tmp_path / "whole", processes.context.Value("q", 0)
    assert processes.run(crashing.count_calls, wanted, calls, **settings) == 0
    draw = random.Random(lora)
    for run in (tmp_path / "one", tmp_path / "two"):
        # A quarter of a run at most, three times: it can't be over before the last kill.
        moments = [draw.randint(1, calls.value // 4) for _ in range(3)]
        codes = [processes.run(crashing.train_until_call, run, moment, **settings) for moment in moments]
        assert codes == [-9] * 3
        crashing.train(run, resume=True, **settings)
        assert_same(outcome(run, lora), outcome(wanted, lora))
    assert lora or all(
        torch.equal(value, outcome(whole)["weights"][name]) for name, value in outcome(wanted)["weights"].items()
    )


# Every checkpoint, every file


@pytest.mark.parametrize("step", [2, 4, 6, 8, 10])
def test_resumed_from_each_checkpoint(whole: Path, tmp_path: Path, step: int) -> None:
    """Step 6 is the end of an epoch; the others lie within one."""
    folder = stopped_after(whole, tmp_path / "run", step)
    crashing.train(folder, resume=True)
    assert_same(outcome(folder), outcome(whole))


@pytest.mark.parametrize(
    "settings",
    [{"dtype": "bf16"}, {"data_collator": "packing", "max_seq_length": 32}, {"gradient_checkpointing": True}],
    ids=lambda settings: next(iter(settings)),
)
def test_resumed_lora_runs_of_other_kinds(tmp_path: Path, settings: dict[str, Any]) -> None:
    crashing.train(tmp_path / "whole", **LORA | settings)
    folder = stopped_after(tmp_path / "whole", tmp_path / "run", 4)
    crashing.train(folder, resume=True, **LORA | settings)
    assert_same(outcome(folder, lora=True), outcome(tmp_path / "whole", lora=True))


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


FILES = ["best", "methods", "optimizer", "random", "trained"]


@pytest.mark.parametrize("name", [*(f"{file}.safetensors" for file in FILES), "state.json", "manifest.json"])
def test_a_damaged_file_sends_the_run_back_to_the_checkpoint_before(whole: Path, tmp_path: Path, name: str) -> None:
    for way, damage in {"cut": lambda content: content[: len(content) // 2], "flipped": flip}.items():
        folder = stopped_after(whole, tmp_path / way, 10)
        path = folder / "checkpoints" / "step-10" / name
        path.write_bytes(damage(path.read_bytes()))
        with pytest.warns(UserWarning, match=r"step-10 is skipped: .*(damaged|lists|read)"):
            assert newest_checkpoint(folder / "checkpoints") == folder / "checkpoints" / "step-8"
        crashing.train(folder, resume=True)
        assert_same(outcome(folder), outcome(whole))


def test_with_every_checkpoint_damaged_the_run_starts_over(whole: Path, tmp_path: Path) -> None:
    folder = stopped_after(whole, tmp_path / "run", 4)
    for path in (folder / "checkpoints").iterdir():
        (path / "state.json").write_text("")
    crashing.train(folder, resume=True)
    assert_same(outcome(folder), outcome(whole))


# What resuming keeps and refuses


def test_a_finished_run_has_nothing_left_to_do(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before = outcome(folder)
    tuner = FineTuner(
        crashing.make_model(),
        crashing.make_data(22, 1),
        crashing.make_data(5, 2),
        crashing.make_config(folder),
        resume=True,
    )
    results = tuner.train()
    assert_same(outcome(folder), before)
    assert results.to_dict() == json.loads((folder / "results.json").read_text())
    assert isinstance(results, Results) and len(results.history) == STEPS
    trained: dict[str, Tensor] = dict(tuner.model.named_parameters())
    assert all(torch.equal(trained[name], value) for name, value in before["weights"].items())


def test_resumed_after_early_stopping_it_stays_stopped(tmp_path: Path) -> None:
    settings = {"learning_rate": 0.05, "num_epochs": 20, "eval_every": 2, "early_stopping_patience": 2}
    wanted = crashing.train(tmp_path / "run", **settings)
    assert wanted.steps < 120 and wanted.best_step < wanted.steps
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    (tmp_path / "run" / "results.json").unlink()
    shutil.rmtree(tmp_path / "run" / "model")
    again = crashing.train(tmp_path / "run", resume=True, **settings)
    assert (again.steps, again.best_step, again.final_perplexity) == (
        wanted.steps,
        wanted.best_step,
        wanted.final_perplexity,
    )
    found = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_metrics_and_tensorboard_are_cut_back_to_the_checkpoint(whole: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = stopped_after(whole, tmp_path / "run", 4)
    (folder / "metrics.jsonl").open("a").write('{"step": 13, "loss": 7')
    crashing.train(folder, resume=True)
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    events = accumulator.Scalars("loss")
    assert [(event.step, event.value) for event in events] == [
        (row["step"], pytest.approx(row["loss"])) for row in rows
    ]


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("learning_rate", 1e-2, "learning_rate: 0.003 -> 0.01"),
        ("seed", 4, "seed: 0 -> 4"),
        ("num_epochs", 3, "num_epochs: 2 -> 3"),
    ],
)
def test_a_changed_setting_is_refused_by_name(whole: Path, setting: str, value: Any, told: str) -> None:
    before = outcome(whole)
    with pytest.raises(ConfigError, match=told):
        crashing.train(whole, resume=True, **{setting: value})
    assert_same(outcome(whole), before)


def test_what_does_not_change_the_weights_may_change(whole: Path, tmp_path: Path) -> None:
    folder = stopped_after(whole, tmp_path / "run", 6)
    crashing.train(folder, resume=True, dataloader_num_workers=1, dataloader_pin_memory=True, save_every=3)
    assert_same(outcome(folder), outcome(whole))
    assert (folder / "checkpoints" / "step-9").exists()


def test_other_data_and_another_model_are_refused(whole: Path) -> None:
    config = crashing.make_config(whole)
    with pytest.raises(ConfigError, match="other training data"):
        FineTuner(
            crashing.make_model(), crashing.make_data(22, 9), crashing.make_data(5, 2), config, resume=True
        ).train()
    with pytest.raises(ConfigError, match="other validation data"):
        FineTuner(
            crashing.make_model(), crashing.make_data(22, 1), crashing.make_data(5, 3), config, resume=True
        ).train()
    model = crashing.make_model()
    del model.blocks[1]
    with pytest.raises(ConfigError, match="another model"):
        FineTuner(model, crashing.make_data(22, 1), crashing.make_data(5, 2), config, resume=True).train()


def test_another_frozen_base_is_refused(tmp_path: Path) -> None:
    """Adapters are nothing without the weights beside them; what trains comes from the checkpoint, whatever it was."""
    config = crashing.make_config(tmp_path / "run", **LORA, max_steps=2)

    def run(change: str = "", resume: bool = True) -> Results:
        model = crashing.make_model()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight += 1e-3 * (name == change)
        return FineTuner(model, crashing.make_data(22, 1), crashing.make_data(5, 2), config, resume=resume).train()

    wanted = run(resume=False)
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(ConfigError, match="made with another model: resume with the model it had"):
        run("blocks.1.mlp.up.weight")
    assert run().final_perplexity == wanted.final_perplexity


def test_other_general_data_and_other_data_of_the_base_tasks_are_refused(tmp_path: Path) -> None:
    config = crashing.make_config(
        tmp_path / "run", max_steps=1, warmup_steps=0, domain_weight=0.5, validation_on_base_tasks=True
    )

    def run(general: int, base: int, resume: bool = True) -> Results:
        data = {"general_dataset": crashing.make_data(3, general), "base_val_dataset": crashing.make_data(3, base)}
        train, val = crashing.make_data(6, 1), crashing.make_data(3, 2)
        return FineTuner(crashing.make_model(), train, val, config, resume=resume, **data).train()

    results = run(3, 4, resume=False)
    with pytest.raises(ConfigError, match="other general data"):
        run(5, 4)
    with pytest.raises(ConfigError, match="other data of the base tasks"):
        run(3, 5)
    assert run(3, 4).forgetting == results.forgetting


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    config = crashing.make_config(tmp_path / "run")
    tuner = FineTuner(crashing.make_model(), crashing.make_data(22, 1), crashing.make_data(5, 2), config)

    def interrupt(*_: Any) -> None:
        if tuner.progress.step == 3:
            raise KeyboardInterrupt

    tuner.optimizer.register_step_pre_hook(interrupt)
    with (
        pytest.warns(UserWarning, match=r"interrupted after step 3.*step-2, and resume goes on"),
        pytest.raises(KeyboardInterrupt),
    ):
        tuner.train()
    assert not (tmp_path / "run" / "results.json").exists()
