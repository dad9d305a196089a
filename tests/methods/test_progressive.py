"""Which weights change in which epoch, and at which rate."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmbuilder.errors import ConfigError
from llmbuilder.finetune import FineTuner, FineTuningConfig
from llmbuilder.methods import Freeze, Full, LoRA, Progressive, Run
from llmbuilder.nn import LoRAConfig

pytestmark = pytest.mark.filterwarnings("ignore:no validation data")


class Watch:
    """Remembers the weights as each epoch finds them."""

    name = "watch"

    def prepare(self, run: Run) -> None:
        self.model, self.starts = run.model, []

    def start_epoch(self, epoch: int) -> None:
        self.starts.append({name: weight.detach().clone() for name, weight in self.model.named_parameters()})


def changed(tuner: FineTuner, starts: list[dict[str, Tensor]]) -> list[set[str]]:
    """What changed in each epoch: which block, or the module."""
    ends = [*starts[1:], {name: weight.detach() for name, weight in tuner.model.named_parameters()}]
    moved = [
        {name for name in start if not torch.equal(start[name], end[name])}
        for start, end in zip(starts, ends, strict=True)
    ]
    return [{".".join(name.split(".")[: 2 if name.startswith("blocks") else 1]) for name in names} for names in moved]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watch:
    from llmbuilder.finetune import tuner

    watch, make = Watch(), tuner.make_methods
    monkeypatch.setattr(tuner, "make_methods", lambda *given: [*make(*given), watch])
    return watch


def test_progressive_unfreezing_trains_the_last_blocks_first(
    make_gpt: Any, make_rows: Any, tune: Any, watched: Watch
) -> None:
    """Bit for bit, under weight decay; head and final norm always, an embedding of its own at the end."""
    schedule = [(0, 0), (1, 1), (3, 3), (4, -1)]
    model = make_gpt(n_layer=4, tie_word_embeddings=False)
    tuner = tune(model, make_rows(8), progressive_unfreezing=True, unfreeze_schedule=schedule, weight_decay=0.3)
    top = {"norm", "head"}
    one, three = top | {"blocks.3"}, top | {"blocks.1", "blocks.2", "blocks.3"}
    everything = three | {"blocks.0", "embedding"}
    assert changed(tuner, watched.starts) == [top, one, one, three, everything]
    steps = {name: int(tuner.optimizer.state[weight]["step"]) for name, weight in model.named_parameters()}
    assert {steps[f"blocks.{n}.mlp.up.weight"] for n in (1, 2)} == {4} and steps["blocks.3.mlp.up.weight"] == 8
    assert steps["embedding.weight"] == 2 and steps["head.weight"] == 10


def test_newly_freed_weights_start_as_in_a_new_optimizer(
    make_gpt: Any, make_rows: Any, tune: Any, weights: Any, watched: Watch
) -> None:
    """Their first step is Adam's first: the rate in the direction of the sign, for gradients that are not tiny."""
    schedule = [(0, 1), (1, 2)]
    settings = {"unfreeze_schedule": schedule, "learning_rate_schedule": [(0, 1e-3)], "weight_decay": 0.0}
    tuner = tune(make_gpt(), make_rows(4), progressive_unfreezing=True, **settings)
    start, end = watched.starts[1], weights(tuner.model)
    step = (end["blocks.0.mlp.up.weight"] - start["blocks.0.mlp.up.weight"]).abs()
    assert step.max() <= 1e-3 * 1.01 and step.median() > 0.99e-3


def test_a_tied_head_brings_the_embedding_which_is_said(
    make_gpt: Any, make_rows: Any, tune: Any, watched: Watch
) -> None:
    with pytest.warns(UserWarning, match="the embedding trains from the start: it shares the head's weight"):
        tuner = tune(make_gpt(), make_rows(8), progressive_unfreezing=True, unfreeze_schedule=[(0, 1)])
    assert changed(tuner, watched.starts) == [{"embedding", "norm", "blocks.1"}]


def test_what_others_froze_stays_frozen_and_adapters_thaw_by_block(make_gpt: Any) -> None:
    model = make_gpt(n_layer=3, tie_word_embeddings=False)
    method = Progressive([(0, 1), (1, -1)])
    for each in (Full(), Freeze(layers=1, embeddings=True), method):
        each.prepare(Run(model))
    method.start_epoch(1)
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(("embedding", "blocks.0."))}

    adapted = make_gpt(n_layer=3)
    method = Progressive([(0, 1), (1, 2)])
    for each in (LoRA(LoRAConfig(rank=2)), method):
        each.prepare(Run(adapted))
    for epoch, blocks in enumerate([{"2"}, {"1", "2"}]):
        method.start_epoch(epoch)
        trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
        assert {name.split(".")[1] for name in trained} == blocks and all("lora_" in name for name in trained)


def test_a_schedule_that_the_model_cannot_follow_is_refused(make_gpt: Any) -> None:
    model = make_gpt()
    Full().prepare(Run(model))
    with pytest.raises(ConfigError, match="frees 3 blocks, and GPT has 2"):
        Progressive([(0, 3)]).prepare(Run(model))
    adapted = make_gpt()
    LoRA(LoRAConfig()).prepare(Run(adapted))
    with pytest.raises(ConfigError, match="nothing would train in epoch 0"):
        Progressive([(0, 0), (1, 1)]).prepare(Run(adapted))


def test_learning_rate_schedule_gives_the_rate_of_each_epoch(make_gpt: Any, make_rows: Any, tune: Any) -> None:
    tuner = tune(make_gpt(), make_rows(8), learning_rate_schedule=[(0, 1e-5), (3, 3e-5), (5, 5e-5)])
    rates = [row["lr"] for row in tuner.results.history]
    assert rates == [1e-5] * 6 + [3e-5] * 4 + [5e-5] * 2
    later = tune(make_gpt(), make_rows(8), learning_rate_schedule=[(1, 3e-5)], warmup_steps=4)
    rates = [row["lr"] for row in later.results.history]
    assert rates == pytest.approx([5e-5 * 1 / 4, 5e-5 * 2 / 4, 3e-5 * 3 / 4, 3e-5])


def test_epochs_and_scheduler_follow_from_the_schedules() -> None:
    config = FineTuningConfig(progressive_unfreezing=True, unfreeze_schedule=[(0, 2), (3, 4), (5, -1)])
    assert (config.num_epochs, config.scheduler) == (6, "cosine")
    config = FineTuningConfig(learning_rate_schedule=[(0, 2e-5), (3, 3e-5)])
    assert (config.num_epochs, config.scheduler, config.learning_rate) == (4, "constant", 2e-5)
    assert FineTuningConfig(learning_rate_schedule=[(0, 2e-5)], num_epochs=9).num_epochs == 9
    assert FineTuningConfig(**config.resolved()) == config


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"unfreeze_schedule": [(0, 1)]}, "no effect without progressive_unfreezing"),
        ({"progressive_unfreezing": True}, "needs an unfreeze_schedule"),
        ({"unfreeze_schedule": []}, "unfreeze_schedule is empty"),
        ({"unfreeze_schedule": [(1, 1)]}, "should say what trains from epoch 0"),
        ({"unfreeze_schedule": [(0, 1), (2, 2), (1, 3)]}, r"out of order: its epochs \[0, 2, 1\]"),
        ({"unfreeze_schedule": [(0, 1), (0, 2)]}, "out of order"),
        ({"unfreeze_schedule": [(0, 3), (1, 2)]}, "should free more blocks"),
        ({"unfreeze_schedule": [(0, -1), (1, 2)]}, "should free more blocks"),
        ({"unfreeze_schedule": [(0, -2)]}, "or -1 for everything"),
        ({"unfreeze_schedule": [(0, 1), (5, 2)], "num_epochs": 5}, "entry for epoch 5, and num_epochs=5 ends before"),
        ({"learning_rate_schedule": [(0, 1e-3)], "scheduler": "cosine"}, "scheduler='cosine' would change it"),
        ({"learning_rate_schedule": [(0, 1e-3)], "learning_rate": 1e-4}, "learning_rate=0.0001 has no effect"),
        ({"learning_rate_schedule": [(1, 0.0)]}, "positive"),
        ({"learning_rate_schedule": [(2, 1e-3), (1, 1e-3)]}, "out of order"),
        ({"learning_rate_schedule": [(0, 1e-3), (4, 1e-3)], "num_epochs": 4}, "entry for epoch 4"),
        ({"learning_rate_schedule": "fast"}, "should be a valid list"),
        ({"unfreeze_schedule": [3]}, "should be a valid tuple"),
    ],
)
def test_a_schedule_that_means_nothing_is_refused(settings: dict[str, Any], told: str) -> None:
    if "unfreeze_schedule" in settings and "no effect" not in told:
        settings = {"progressive_unfreezing": True} | settings
    with pytest.raises(ConfigError, match=told):
        FineTuningConfig(**settings)


def test_a_resumed_run_thaws_as_an_uninterrupted_one(
    make_gpt: Any, make_rows: Any, tune: Any, weights: Any, tmp_path: Path
) -> None:
    settings = {"progressive_unfreezing": True, "unfreeze_schedule": [(0, 1), (2, -1)], "save_every": 3}
    settings |= {"learning_rate_schedule": [(0, 1e-3), (1, 2e-3)], "output_dir": tmp_path / "run"}
    whole = tune(make_gpt(), make_rows(8), **settings)
    wanted, log = weights(whole.model), (tmp_path / "run" / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6")
    (tmp_path / "run" / "results.json").unlink()
    again = tune(make_gpt(), make_rows(8), **settings, resume=True)
    assert len(wanted) and all(torch.equal(wanted[name], value) for name, value in weights(again.model).items())
    rates = [json.loads(line)["lr"] for line in log.splitlines()]
    assert rates == [row["lr"] for row in again.results.history] == [1e-3] * 2 + [2e-3] * 4
