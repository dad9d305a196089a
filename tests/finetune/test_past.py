"""From task to task: a second run goes on exactly from where the first one left the model and its methods."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llmbuilder.data import MultiTaskDataset
from llmbuilder.errors import ConfigError, LLMBuilderError
from llmbuilder.finetune import FineTuner, Results
from llmbuilder.finetune.past import Past
from llmbuilder.nn import load_adapter

Make = Callable[..., Any]
KINDS = {"full": {"use_lora": False, "weight_decay": 0.1}, "lora": {"lora_rank": 3, "lora_dropout": 0.2}}
KEPT = {
    "continual_learning": True,
    "regularization_method": "ewc",
    "regularization_strength": 3.0,
    "memory_buffer_size": 6,
    "replay_frequency": 0.3,
}


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, make_gpt: Make, make_examples: Make, make_config: Make) -> Make:
    """A run of one of two tasks, with EWC and replay, on adapters or on all weights."""
    kind = {"use_lora": None} | KINDS[request.param]

    def run(task: int, folder: Path | None = None, model: nn.Module | None = None, **how: Any) -> FineTuner:
        config = make_config(**kind | KEPT, output_dir=folder, save_every=2, num_epochs=1, seed=task)
        return FineTuner(
            model or make_gpt(),
            make_examples(11, seed=task),
            make_examples(4, seed=10),
            config,
            general_dataset=make_examples(5, seed=20),
            **how,
        )

    return run


def weights(folder: Path) -> dict[str, Tensor]:
    (file,) = [*folder.glob("adapter/adapter_model.safetensors"), *folder.glob("model/model.safetensors")]
    return load_file(file)


def same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in some.items())


def same_past(one: Past, other: Past) -> bool:
    if one.tasks != other.tasks or one.methods.keys() != other.methods.keys():
        return False
    for method, state in one.methods.items():
        theirs = other.methods[method]
        tensors = {name for name, value in state.items() if isinstance(value, Tensor)}
        if state.keys() != theirs.keys() or any(not torch.equal(state[name], theirs[name]) for name in tensors):
            return False
        if any(state[name] != theirs[name] for name in state.keys() - tensors):
            return False
    return True


def test_a_second_task_goes_on_from_the_folder_of_the_first_as_in_one_process(make: Make, tmp_path: Path) -> None:
    """Weights, Fisher information, anchors and buffer: bit for bit, through the files."""
    first = make(1, tmp_path / "a")
    first.train()
    first.end_task("letters")
    second = make(2, tmp_path / "b", continue_from=tmp_path / "a")
    results = second.train()
    assert all(row["extra_loss"] > 0 for row in results.history[1:])

    alone = make(1)
    alone.train()
    alone.end_task("letters")
    again = make(2, tmp_path / "c", model=alone.model, continue_from=alone)
    again.train()
    assert same(weights(tmp_path / "b"), weights(tmp_path / "c"))
    past = Past.load(tmp_path / "b" / "past")
    assert same_past(past, Past.load(tmp_path / "c" / "past"))
    assert [task["name"] for task in past.tasks] == ["letters", "task 2"]
    assert past.methods["replay"]["offered"] == 22 and len(past.methods["replay"]["examples"]) == 6


def test_several_methods_at_once_resume_bit_for_bit(
    make_gpt: Make, make_examples: Make, make_config: Make, tmp_path: Path
) -> None:
    """LoRA, EWC, replay and several tasks at once: killed within the first and the second run, and between them."""

    def run(seed: int, folder: Path, **how: Any) -> None:
        parts = [("a", make_examples(9, seed=seed), 0.7), ("b", make_examples(6, seed=seed + 10), 0.3)]
        config = make_config(
            **KINDS["lora"] | KEPT | {"use_lora": True},
            multi_task=True,
            task_weights={"b": 2.0},
            output_dir=folder,
            save_every=2,
            num_epochs=1,
            seed=seed,
        )
        data = MultiTaskDataset(parts), MultiTaskDataset([(name, rows[:2], share) for name, rows, share in parts])
        FineTuner(make_gpt(), *data, config, general_dataset=make_examples(4, seed=20), **how).train()

    run(1, tmp_path / "a")
    run(2, tmp_path / "b", continue_from=tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "cut")
    stop_at(tmp_path / "cut", 2)
    run(1, tmp_path / "cut", resume=True)
    assert same_past(Past.load(tmp_path / "cut" / "past"), Past.load(tmp_path / "a" / "past"))
    shutil.copytree(tmp_path / "b", tmp_path / "cut2")
    stop_at(tmp_path / "cut2", 2)
    run(2, tmp_path / "cut2", continue_from=tmp_path / "cut", resume=True)
    assert same(weights(tmp_path / "cut2"), weights(tmp_path / "b"))
    assert same_past(Past.load(tmp_path / "cut2" / "past"), Past.load(tmp_path / "b" / "past"))


def test_examples_of_earlier_tasks_that_are_too_long_now_are_refused_before_training(
    make_gpt: Make, make_examples: Make, make_config: Make, tmp_path: Path
) -> None:
    def run(length: int, limit: int, **how: Any) -> FineTuner:
        rows = make_examples(6, shortest=length, longest=length)
        settings = {"use_lora": False, "memory_buffer_size": 6, "replay_frequency": 0.3, "continual_learning": True}
        config = make_config(**settings, max_seq_length=limit, num_epochs=1)
        return FineTuner(make_gpt() if not how else how["continue_from"].model, rows, rows[:2], config, **how)

    first = run(20, 20)
    first.train()
    with pytest.raises(LLMBuilderError, match=r"replayed examples: the longest .* 20 tokens, and max_seq_length is 12"):
        run(8, 12, continue_from=first)
    assert run(8, 20, continue_from=first).total_steps


def stop_at(folder: Path, step: int) -> None:
    """What a run leaves that is killed after the checkpoint of this step."""
    for name in ("results.json", "loss.png", "model", "adapter", "past"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in (folder / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize("step", [2, 4])
def test_a_killed_second_task_resumes_bit_for_bit(make: Make, tmp_path: Path, step: int) -> None:
    """In the middle of the task, and after its last step, before it became a past."""
    make(1, tmp_path / "a").train()
    make(2, tmp_path / "b", continue_from=tmp_path / "a").train()
    shutil.copytree(tmp_path / "b", tmp_path / "cut")
    stop_at(tmp_path / "cut", step)
    resumed = make(2, tmp_path / "cut", continue_from=tmp_path / "a", resume=True).train()
    assert resumed.steps == 4
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "b"))
    assert same_past(Past.load(tmp_path / "cut" / "past"), Past.load(tmp_path / "b" / "past"))


def test_a_killed_first_task_resumes_with_the_same_past(make: Make, tmp_path: Path) -> None:
    """The Fisher information of the base model is in the checkpoint; it is not estimated again from a moved model."""
    make(1, tmp_path / "a").train()
    shutil.copytree(tmp_path / "a", tmp_path / "cut")
    stop_at(tmp_path / "cut", 2)
    make(1, tmp_path / "cut", resume=True).train()
    assert same_past(Past.load(tmp_path / "cut" / "past"), Past.load(tmp_path / "a" / "past"))


def test_a_finished_run_that_is_resumed_is_as_it_was_and_can_be_gone_on_from(make: Make, tmp_path: Path) -> None:
    results = make(1, tmp_path / "a").train()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a" / "past").iterdir()}
    again = make(1, tmp_path / "a", resume=True)
    found = again.train()
    assert isinstance(found, Results) and found.final_perplexity == results.final_perplexity
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert same_past(again._past, Past.load(tmp_path / "a" / "past"))
    later = make(2, model=again.model, continue_from=again)
    assert same_past(later._past, again._past)


def test_what_does_not_fit_is_refused_by_name(
    make: Make, make_gpt: Make, make_examples: Make, make_config: Make, tmp_path: Path
) -> None:
    first = make(1, tmp_path / "a")
    first.train()
    make(2, tmp_path / "b", continue_from=tmp_path / "a").train()
    stop_at(tmp_path / "b", 2)
    with pytest.raises(ConfigError, match="after other tasks"):
        make(2, tmp_path / "b", resume=True).train()
    other = make_config(use_lora=not first.config.use_lora)
    with pytest.raises(ConfigError, match=r"it holds no (adapter|model)/"):
        FineTuner(make_gpt(), make_examples(4), make_examples(2), other, continue_from=tmp_path / "a")
    with pytest.raises(ConfigError, match="that has trained"):
        make(2, continue_from=make(1))
    with pytest.raises(ConfigError, match="the model that it trained"):
        make(2, continue_from=first)
    with pytest.raises(LLMBuilderError, match="no run has come to its end there"):
        make(2, continue_from=tmp_path / "nowhere")
    for how in ("resume", "overwrite"):
        with pytest.raises(ConfigError, match="a next task needs a folder of its own"):
            make(2, tmp_path / "a", continue_from=tmp_path / "b" / ".." / "a", **{how: True})
    state = tmp_path / "a" / "past" / "state.json"
    state.write_text(state.read_text()[:-1])
    with pytest.raises(LLMBuilderError, match=r"state\.json is damaged"):
        make(2, continue_from=tmp_path / "a")


def test_a_run_of_another_model_or_rank_is_refused(
    make_gpt: Make, make_examples: Make, make_config: Make, tmp_path: Path
) -> None:
    data = make_examples(4), make_examples(2)
    FineTuner(make_gpt(), *data, make_config(output_dir=tmp_path / "full", max_steps=1)).train()
    with pytest.raises(ConfigError, match="another model"):
        FineTuner(make_gpt(n_layer=1), *data, make_config(), continue_from=tmp_path / "full")
    lora = {"use_lora": True, "lora_rank": 2}
    FineTuner(make_gpt(), *data, make_config(**lora, output_dir=tmp_path / "lora", max_steps=1)).train()
    with pytest.raises(ConfigError, match="rank 2 and alpha 4"):
        FineTuner(make_gpt(), *data, make_config(use_lora=True, lora_rank=4), continue_from=tmp_path / "lora")


def test_an_adapter_that_the_model_has_already_is_gone_on_with(
    make_gpt: Make, make_examples: Make, make_config: Make, tmp_path: Path
) -> None:
    data = make_examples(8), make_examples(2)
    lora = {"use_lora": True, "lora_rank": 2, "dropout_rate": 0.1}
    FineTuner(make_gpt(), *data, make_config(**lora, output_dir=tmp_path / "a")).train()
    model = make_gpt()
    load_adapter(model, tmp_path / "a" / "adapter")
    config = make_config(**lora | {"dropout_rate": 0.3})
    tuner = FineTuner(model, *data, config, continue_from=tmp_path / "a")
    assert {update.p for update in model.modules() if hasattr(update, "scaling")} == {0.3}
    results = tuner.train()
    assert results.base_perplexity < FineTuner(make_gpt(), *data, make_config(**lora)).train().base_perplexity


def test_end_task_before_training_makes_a_past_of_what_the_model_knows(
    make_gpt: Make, make_examples: Make, make_config: Make
) -> None:
    config = make_config(**KEPT)
    known = FineTuner(make_gpt(), make_examples(9, seed=3), make_examples(2), config, general_dataset=make_examples(3))
    known.end_task("before")
    assert known._past.tasks[0]["name"] == "before"
    assert known._past.methods["replay"]["offered"] == 9
    later = FineTuner(known.model, make_examples(8), make_examples(2), config, continue_from=known)
    assert sum(source == "replay" for keys in later._plan(0) for source, _ in keys) == 3
    assert any(value.any() for name, value in later._past.methods["ewc"].items() if name.startswith("fisher/"))


def test_a_task_that_was_made_of_known_data_is_not_trained_on(
    make_gpt: Make, make_examples: Make, make_config: Make
) -> None:
    known = FineTuner(
        make_gpt(), make_examples(9), make_examples(2), make_config(**KEPT), general_dataset=make_examples(3)
    )
    known.end_task("before")
    with pytest.raises(LLMBuilderError, match="train with a new one"):
        known.train()


def test_what_a_method_knows_outlives_a_task_without_it(make_gpt: Make, make_examples: Make, make_config: Make) -> None:
    """EWC and replay, then neither, then both again: the third run has what the first one left."""
    model, general = make_gpt(), make_examples(3, seed=20)
    first = FineTuner(model, make_examples(9), make_examples(2), make_config(**KEPT), general_dataset=general)
    first.train()
    second = FineTuner(model, make_examples(8), make_examples(2), make_config(), continue_from=first)
    second.train()
    assert same_past(Past(methods=second._past.methods), Past(methods=first._past.methods))
    third = FineTuner(
        model, make_examples(7), make_examples(2), make_config(**KEPT), general_dataset=general, continue_from=second
    )
    third.train()
    assert third._past.methods["replay"]["offered"] == 16 and len(third._past.tasks) == 3


def test_a_bf16_model_goes_on_with_the_bits_that_were_trained_in_fp32(
    make_gpt: Make, make_examples: Make, make_config: Make, tmp_path: Path
) -> None:
    data = make_examples(8), make_examples(2)
    first = FineTuner(make_gpt().bfloat16(), *data, make_config(output_dir=tmp_path / "a", learning_rate=1e-4))
    first.train()
    second = FineTuner(make_gpt().bfloat16(), *data, make_config(), continue_from=tmp_path / "a")
    trained = dict(first.model.named_parameters())
    assert all(torch.equal(weight, trained[name]) for name, weight in second.model.named_parameters())
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in trained.values())
