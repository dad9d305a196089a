"""Several tasks: weights of their losses, heads and adapters of their own."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llmbuilder.data import MultiTaskDataset, collate
from llmbuilder.errors import ConfigError, LLMBuilderError
from llmbuilder.finetune import FineTuner, FineTuningConfig
from llmbuilder.methods import Batch, Full, LoRA, MultiTask, Run, TaskAdapters
from llmbuilder.models import load_model
from llmbuilder.nn import LoRAConfig, load_adapter, load_heads, use_head

pytestmark = pytest.mark.filterwarnings("ignore:no validation data")
TASKS = ("qa", "text")


@pytest.fixture
def make_tasks(make_rows: Any) -> Any:
    def make(count: int = 8) -> MultiTaskDataset:
        return MultiTaskDataset([("qa", make_rows(count, 1), 0.5), ("text", make_rows(count, 2), 0.5)])

    return make


def prepared(model: Any, data: Any, *others: Any, weights: Any = (), heads: bool = False) -> tuple[MultiTask, Run]:
    method, run = MultiTask(dict(weights), heads, adapters=False), Run(model, sources={"train": data})
    for each in (*(others or (Full(),)), method):
        each.prepare(run)
    return method, run


def batches(data: Any, *lists: list[int]) -> list[Batch]:
    made = []
    for keys in lists:
        tensors = collate([data[n] for n in keys])
        targets = int((tensors["labels"][:, 1:] >= 0).sum())
        made.append(Batch(tensors, [("train", n) for n in keys], targets))
    return made


def gradients(method: MultiTask, model: Any, window: list[Batch]) -> dict[str, torch.Tensor]:
    """Of a step, as the loop takes it."""
    model.zero_grad()
    for batch in window:
        for part in method.split(batch):
            method.loss(model, part, window).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def test_multi_task_loss_is_the_weighted_sum_of_the_tasks_mean_losses(make_gpt: Any, make_tasks: Any) -> None:
    """Over the step's targets of each task, whatever the batches: value and gradients equal the formula."""
    model, data = make_gpt(), make_tasks()
    weights = {"qa": 1.0, "text": 0.3}
    method, _ = prepared(model, data, weights=weights)
    window = batches(data, [0, 1, 2, 4], [3, 6])
    loss = sum(float(method.loss(model, part, window).detach()) for batch in window for part in method.split(batch))
    found = gradients(method, model, window)

    sums, counts = dict.fromkeys(TASKS, torch.zeros(())), dict.fromkeys(TASKS, 0)
    for index in (0, 1, 2, 4, 3, 6):
        ids = torch.tensor([data[index]["input_ids"]])
        task = data.task_of(index)
        sums[task] = sums[task] + F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        counts[task] += ids.shape[1] - 1
    assert all(counts.values())
    expected = sum(weights[task] * sums[task] / counts[task] for task in TASKS)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    model.zero_grad()
    expected.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-4, atol=1e-6)


def test_task_weights_scale_gradients_linearly(make_gpt: Any, make_tasks: Any) -> None:
    def found(**weights: float) -> torch.Tensor:
        model, data = make_gpt(), make_tasks()
        method, _ = prepared(model, data, weights=weights)
        return gradients(method, model, batches(data, list(range(6))))["blocks.0.mlp.up.weight"].double()

    qa, text, both = found(qa=1, text=0), found(qa=0, text=1), found(qa=0.8, text=1.2)
    torch.testing.assert_close(0.8 * qa + 1.2 * text, both, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(3 * qa, found(qa=3, text=0), rtol=1e-4, atol=1e-7)
    assert qa.abs().max() > 0 and not torch.allclose(qa, text)


@pytest.mark.parametrize("tied", [True, False])
def test_task_specific_heads_get_no_gradient_from_other_tasks(make_gpt: Any, make_tasks: Any, tied: bool) -> None:
    """Exactly zero; and the model's own head none at all, while the body learns from both."""
    model, data = make_gpt(tie_word_embeddings=tied), make_tasks()
    before = model.head.weight.detach().clone()
    method, _ = prepared(model, data, heads=True)
    for head in model.head.heads:
        assert torch.equal(head.weight, before) and head.weight is not model.embedding.weight
    only = [n for n in range(len(data)) if data.task_of(n) == "qa"][:4]
    found = gradients(method, model, batches(data, only))
    own, other = found["head.heads.0.weight"], found.get("head.heads.1.weight")
    assert own.abs().max() > 0 and (other is None or not other.any())
    if not tied:
        assert "head.base.weight" not in found
    assert found["blocks.0.mlp.up.weight"].abs().max() > 0
    assert len(gradients(method, model, batches(data, list(range(6))))) == len(found) + 1
    assert model.head.active is None


def test_heads_are_written_and_come_back(make_gpt: Any, make_tasks: Any, tune: Any, tmp_path: Path) -> None:
    """Full fine-tuning: a plain model, and the heads beside it."""
    settings = {"multi_task": True, "task_specific_heads": True, "task_weights": {"qa": 1.0, "text": 0.5}}
    tuner = tune(make_gpt(), make_tasks(), **settings, output_dir=tmp_path / "run")
    again: Any = load_model(tmp_path / "run" / "model")
    assert type(again.head) is nn.Linear
    load_heads(again, tmp_path / "run" / "heads")
    ids = torch.tensor([[1, 2, 3]])
    logits = []
    for task in (*TASKS, None):
        for model in (again, tuner.model):
            use_head(model, task)
        logits.append(again(ids).logits)
        assert torch.equal(tuner.model(ids).logits, logits[-1])
    assert not any(torch.allclose(logits[0], other) for other in logits[1:])
    with pytest.raises(LLMBuilderError, match="no head is for the task 'qu'; did you mean 'qa'"):
        use_head(again, "qu")


def test_shared_encoder_false_trains_an_adapter_for_each_task(
    make_gpt: Any, make_tasks: Any, tune: Any, tmp_path: Path
) -> None:
    """An adapter hears of its own task only: what it becomes is what training that task alone gives."""
    settings = {"multi_task": True, "shared_encoder": False, "lora_rank": 2, "learning_rate": 1e-2}
    tuner = tune(make_gpt(), make_tasks(), **settings, output_dir=tmp_path / "run")
    assert tuner.config.use_lora
    assert {path.name for path in (tmp_path / "run" / "adapters").iterdir()} == set(TASKS)
    assert not (tmp_path / "run" / "adapter").exists()

    silent = tune(make_gpt(), make_tasks(), **settings, task_weights={"text": 0.0}, weight_decay=0.0)
    one = {name: w for name, w in tuner.model.named_parameters() if ".qa." in name}
    other = dict(silent.model.named_parameters())
    assert one and any("lora_B" in name and w.any() for name, w in one.items())
    moved = [w for name, w in other.items() if ".text." in name and "lora_B" in name]
    assert moved and not any(w.any() for w in moved)

    ids = torch.tensor([[1, 2, 3]])
    loaded = []
    for task in TASKS:
        base = make_gpt()
        load_adapter(base, tmp_path / "run" / "adapters" / task)
        loaded.append(base.eval()(ids).logits)
    assert not torch.allclose(*loaded)


@pytest.mark.parametrize("settings", [{"task_specific_heads": True}, {"shared_encoder": False}, {}])
def test_each_task_is_judged_with_what_it_has(make_gpt: Any, make_rows: Any, tune: Any, settings: Any) -> None:
    """Two tasks that contradict each other: one says 3 to everything, the other 5. A shared model can but guess."""
    qa, text = ([{"input_ids": [n, said], "labels": [n, said]} for n in range(16)] for said in (3, 5))
    data = MultiTaskDataset([("qa", qa, 0.5), ("text", text, 0.5)])
    adapters = {"lora_rank": 8, "target_modules": "all"} if "shared_encoder" in settings else {}
    plain = {"multi_task": True, "num_epochs": 10, "learning_rate": 2e-2, "batch_size": 8}
    model = make_gpt()
    with torch.no_grad():
        model.embedding.weight *= 50  # the head too: a frozen one must be able to say something
    tuner = tune(model, data, data, **settings, **adapters, **plain)
    chance = math.log(2)
    assert tuner.evaluate(data).loss < 0.5 * chance if settings else tuner.evaluate(data).loss > 0.95 * chance
    assert math.log(tuner.results.final_perplexity) == pytest.approx(tuner.evaluate(data).loss, rel=1e-6)


def test_data_without_tasks_are_judged_by_what_no_task_owns_which_is_said(
    make_gpt: Any, make_rows: Any, make_tasks: Any, tune: Any
) -> None:
    with pytest.warns(UserWarning, match="judged by what no task has of its own"):
        tune(make_gpt(), make_tasks(), make_rows(4), multi_task=True, task_specific_heads=True)


def test_a_step_of_the_loop_is_the_weighted_sum_under_accumulation(make_gpt: Any, make_tasks: Any, tune: Any) -> None:
    settings = {"multi_task": True, "task_weights": {"qa": 2.0}, "optimizer": "sgd", "max_steps": 1}
    big = tune(make_gpt(), make_tasks(), **settings, batch_size=8)
    small = tune(make_gpt(), make_tasks(), **settings, batch_size=2, gradient_accumulation_steps=4)
    for one, other in zip(big.model.parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert big.results.history[0]["loss"] == pytest.approx(small.results.history[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("settings", [{"task_specific_heads": True}, {"shared_encoder": False, "lora_dropout": 0.3}])
def test_a_resumed_run_repeats_an_uninterrupted_one(
    make_gpt: Any, make_tasks: Any, tune: Any, weights: Any, tmp_path: Path, settings: Any
) -> None:
    settings = settings | {"multi_task": True, "output_dir": tmp_path / "run", "save_every": 2, "num_epochs": 1}
    whole = tune(make_gpt(), make_tasks(), **settings)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-4")
    (tmp_path / "run" / "results.json").unlink()
    again = tune(make_gpt(), make_tasks(), **settings, resume=True)
    assert all(torch.equal(weights(whole.model)[name], value) for name, value in weights(again.model).items())
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 4


def test_gradient_checkpointing_recomputes_with_the_tasks_own_parts(make_gpt: Any, make_tasks: Any, tune: Any) -> None:
    settings = {"multi_task": True, "shared_encoder": False, "lora_rank": 2, "optimizer": "sgd"}
    plain, saved = (tune(make_gpt(), make_tasks(), **settings, gradient_checkpointing=on) for on in (False, True))
    for one, other in zip(plain.model.parameters(), saved.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"task_weights": {"qa": 1.0}}, "task_weights have no effect without multi_task"),
        ({"task_specific_heads": True}, "no effect without multi_task"),
        ({"shared_encoder": False}, "no effect without multi_task"),
        ({"multi_task": True, "shared_encoder": False, "use_lora": False}, "use_lora=False forbids"),
        ({"multi_task": True, "data_collator": "packing"}, "holds examples of several tasks"),
        ({"multi_task": True, "task_weights": {"qa": -1}}, "greater than or equal to 0"),
        ({"multi_task": True, "shared_encoder": False, "domain_weight": 0.5}, "belong to no task"),
    ],
)
def test_what_means_nothing_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        FineTuningConfig(**settings)


def test_data_and_weights_must_name_the_same_tasks(make_gpt: Any, make_rows: Any, make_tasks: Any) -> None:
    with pytest.raises(ConfigError, match="needs a MultiTaskDataset"):
        FineTuner(make_gpt(), make_rows(4), config=FineTuningConfig(multi_task=True))
    config = FineTuningConfig(multi_task=True, task_weights={"qu": 1.0})
    with pytest.raises(ConfigError, match="no task is called 'qu'; did you mean 'qa'"):
        FineTuner(make_gpt(), make_tasks(), config=config)


def test_an_adapter_a_task_goes_on_with_those_there_are(make_gpt: Any, make_rows: Any, make_tasks: Any) -> None:
    """A new task gets one beside them; what is none of this run's stays as it is, and is kept."""
    config = LoRAConfig(rank=2)
    model = make_gpt()
    TaskAdapters(config).prepare(Run(model, sources={"train": make_tasks()}))
    data = MultiTaskDataset([("qa", make_rows(4), 0.5), ("new", make_rows(4), 0.5)])
    again = LoRAConfig(rank=2, dropout=0.25)
    TaskAdapters(again).prepare(Run(model, sources={"train": data}, continues=True))
    owners = {
        name.split(".adapters.")[1].split(".")[0]: w for name, w in model.named_parameters() if ".adapters." in name
    }
    assert {name: weight.requires_grad for name, weight in owners.items()} == {"qa": True, "text": False, "new": True}
    assert {update.p for name, update in model.named_modules() if name.endswith(".adapters.qa")} == {0.25}
    with pytest.raises(ConfigError, match="rank 2 and alpha 4"):
        TaskAdapters(LoRAConfig(rank=3)).prepare(Run(model, sources={"train": data}, continues=True))

    alone = make_gpt()
    LoRA(config).prepare(Run(alone))
    with pytest.raises(ConfigError, match="the adapter default, which is of none of the tasks qa, text"):
        TaskAdapters(config).prepare(Run(alone, sources={"train": make_tasks()}, continues=True))


@pytest.mark.parametrize("name", ["a/b", "..\\up", "x" * 300])
def test_a_task_whose_name_is_no_folder_gets_no_adapter(make_gpt: Any, make_rows: Any, name: str) -> None:
    data = MultiTaskDataset([("qa", make_rows(4), 0.5), (name, make_rows(4), 0.5)])
    with pytest.raises(LLMBuilderError, match="can't be the name of an adapter"):
        FineTuner(make_gpt(), data, config=FineTuningConfig(multi_task=True, shared_encoder=False))


def test_unfreezing_counts_blocks_and_not_the_heads_of_tasks(make_gpt: Any, make_rows: Any) -> None:
    data = MultiTaskDataset([(name, make_rows(4), 1.0) for name in ("a", "b", "c")])
    settings = {"multi_task": True, "task_specific_heads": True, "unfreeze_schedule": [(0, 1)]}
    tuner = FineTuner(make_gpt(), data, config=FineTuningConfig(progressive_unfreezing=True, **settings))
    tuner.methods.start_epoch(0)
    names = {name for name, weight in tuner.model.named_parameters() if weight.requires_grad}
    assert not any(name.startswith("blocks.0.") for name in names)
    assert all(any(name.startswith(part) for name in names) for part in ("blocks.1.", "head.heads.0", "head.heads.2"))


@pytest.mark.parametrize("between", [{}, {"regularization_method": "ewc", "regularization_strength": 1.0}])
def test_heads_outlive_a_task_without_them(
    make_gpt: Any, make_rows: Any, make_tasks: Any, tune: Any, weights: Any, tmp_path: Path, between: dict[str, Any]
) -> None:
    """Heads, then a plain task or one under EWC, then heads again: from folder to folder as in one process."""
    heads = {"multi_task": True, "task_specific_heads": True, "num_epochs": 1, "use_lora": False}
    plain = {"use_lora": False, "num_epochs": 1} | between | ({"continual_learning": True} if between else {})
    rows, general = make_rows(4, 5), {"general_dataset": make_rows(3, 9)} if between else {}
    stages = [(make_tasks(), heads, {}), (rows, plain, general), (make_tasks(), heads, {})]

    def chain(folders: bool) -> Any:
        tuner, model = None, make_gpt(tie_word_embeddings=False)
        for number, (data, settings, given) in enumerate(stages):
            where = {"output_dir": tmp_path / str(number)} if folders else {}
            model = make_gpt(tie_word_embeddings=False) if folders else model
            source = tmp_path / str(number - 1) if folders and number else tuner
            tuner = tune(model, data, continue_from=source, **given, **settings, **where)
        return tuner

    one, other = chain(folders=False), chain(folders=True)
    assert all(torch.equal(weights(one.model)[name], value) for name, value in weights(other.model).items())
    assert one.results.base_perplexity == other.results.base_perplexity


def test_ewc_knows_the_models_own_output_layer_also_under_heads_of_other_tasks(
    make_gpt: Any, make_rows: Any, make_tasks: Any, tune: Any
) -> None:
    ewc = {"continual_learning": True, "regularization_method": "ewc", "regularization_strength": 3.0}
    settings = ewc | {"use_lora": False, "num_epochs": 1}
    first = tune(make_gpt(tie_word_embeddings=False), make_rows(4), **settings, general_dataset=make_rows(3, 9))
    heads = {"multi_task": True, "task_specific_heads": True, "use_lora": False, "num_epochs": 1}
    second = tune(first.model, make_tasks(), **heads, continue_from=first)
    third = tune(first.model, make_rows(4, 5), **settings, continue_from=second)
    known = {name for name in third._past.methods["ewc"] if name.startswith("fisher/")}
    assert known == {name for name in first._past.methods["ewc"] if name.startswith("fisher/")}
    assert "fisher/head.weight" in known
    assert not torch.equal(
        first._past.methods["ewc"]["fisher/head.weight"], third._past.methods["ewc"]["fisher/head.weight"]
    )
