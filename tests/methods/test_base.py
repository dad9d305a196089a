"""The loop's hooks: when each is called, and that methods of every planned kind fit in."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmbuilder.finetune import FineTuner, FineTuningConfig, tuner
from llmbuilder.methods import Batch, Full, Key, Run
from llmbuilder.models import GPT, GPTConfig
from llmbuilder.nn.heads import LanguageHead

pytestmark = pytest.mark.filterwarnings("ignore:no validation data")


def make_model(n_layer: int = 2) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT(GPTConfig(vocab_size=31, n_layer=n_layer, n_head=2, n_embd=16, block_size=16))


def make_data(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    rows = torch.randint(31, (count, 9), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


@pytest.fixture
def train_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FineTuner]:
    """A full fine-tuning run of some epochs with more methods; returns its tuner when it is over."""

    def train(*methods: Any, folder: Path | None = None, resume: bool = False, **settings: Any) -> FineTuner:
        torch.set_num_threads(1)
        plain = {"batch_size": 4, "scheduler": "constant", "learning_rate": 0.01, "optimizer": "sgd", "num_epochs": 2}
        config = FineTuningConfig(**plain | {"weight_decay": 0.0, "max_grad_norm": None, "device": "cpu"} | settings)
        config = config.model_copy(update={"output_dir": folder})
        monkeypatch.setattr(tuner, "make_methods", lambda *_: [Full(), *methods])
        made = FineTuner(make_model(), make_data(12), config=config, resume=resume)
        made.results = made.train()
        return made

    return train


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def test_hooks_are_called_in_the_documented_order(train_with: Any) -> None:
    class Log:
        name = "log"

        def __init__(self) -> None:
            self.calls: list[str] = []

        def __getattr__(self, hook: str) -> Any:
            def called(*arguments: Any) -> Any:
                self.calls.append(hook)
                return {"batches": arguments[-1] if arguments else None, "penalty": 0.0, "state": {}}.get(hook)

            hooks = ("prepare", "batches", "start_epoch", "extra_loss", "penalty", "after_step", "after_task")
            if hook not in hooks:
                raise AttributeError(hook)
            return called

    log = Log()
    train_with(log, gradient_accumulation_steps=2, num_epochs=1)
    step = ["extra_loss", "extra_loss", "penalty", "after_step"]
    short = ["extra_loss", "penalty", "after_step"]
    assert log.calls == ["prepare", "batches", "batches", "start_epoch", *step, *short, "after_task"]


def test_a_penalty_once_a_step_equals_its_gradient_in_the_loss(train_with: Any) -> None:
    """L2 to the start, as elastic weight consolidation will be: once a step, however many batches that has."""

    class Anchor:
        name = "anchor"
        strength = 3.0

        def prepare(self, run: Run) -> None:
            self.model, self.start = run.model, weights(run.model)

        def penalty(self) -> float:
            value = 0.0
            for name, weight in self.model.named_parameters():
                drift = weight.detach() - self.start[name]
                assert weight.grad is not None
                weight.grad += self.strength * drift
                value += self.strength / 2 * float(drift.pow(2).sum())
            return value

    class InTheLoss(Anchor):
        penalty = None  # type: ignore[assignment]

        def __getattribute__(self, name: str) -> Any:
            if name == "penalty":
                raise AttributeError(name)
            return object.__getattribute__(self, name)

        def extra_loss(self, model: nn.Module, batch: Batch, window: list[Batch]) -> Tensor | None:
            if batch is not window[0]:
                return None
            drifts = [(weight - self.start[name]).pow(2).sum() for name, weight in model.named_parameters()]
            return self.strength / 2 * torch.stack(drifts).sum()

    by_grad, by_loss = (
        train_with(Anchor(), gradient_accumulation_steps=2),
        train_with(InTheLoss(), gradient_accumulation_steps=2),
    )
    plain = train_with(gradient_accumulation_steps=2)
    for name, weight in weights(by_grad.model).items():
        torch.testing.assert_close(weight, weights(by_loss.model)[name], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(plain.model.head.weight, by_grad.model.head.weight, rtol=1e-4)
    told = [row["extra_loss"] for row in by_grad.results.history]
    assert told[0] == 0.0 and all(value > 0 for value in told[1:])
    assert told[1:] == pytest.approx([row["extra_loss"] for row in by_loss.results.history][1:], rel=1e-4)


def test_batches_may_be_drawn_from_several_sources(train_with: Any) -> None:
    class Replay:
        """Every fourth example comes from elsewhere."""

        name = "replay"

        def prepare(self, run: Run) -> None:
            self.seen: list[Key] = []
            run.sources["memory"] = make_data(5, seed=7)

        def batches(self, epoch: int, plan: Iterable[list[Key]]) -> Iterable[list[Key]]:
            return [[("memory", (epoch + row) % 5), *keys[1:]] for row, keys in enumerate(plan)]

        def extra_loss(self, model: nn.Module, batch: Batch, window: list[Batch]) -> None:
            rows = {"train": make_data(12), "memory": make_data(5, seed=7)}
            assert batch.tensors["input_ids"].tolist() == [rows[name][i]["input_ids"] for name, i in batch.keys]
            self.seen += batch.keys

    replay = Replay()
    train_with(replay)
    assert [name for name, _ in replay.seen] == ["memory", "train", "train", "train"] * 6
    assert [index for name, index in replay.seen if name == "memory"] == [0, 1, 2, 1, 2, 3]


def test_what_trains_may_change_by_epoch_and_new_state_starts_clean(train_with: Any) -> None:
    class Progressive:
        name = "progressive"

        def prepare(self, run: Run) -> None:
            self.model, self.starts = run.model, []

        def start_epoch(self, epoch: int) -> None:
            self.starts.append(weights(self.model))
            self.model.blocks[0].requires_grad_(epoch >= 1)

    progressive = Progressive()
    made = train_with(progressive, optimizer="adamw", weight_decay=0.5)
    first, second = progressive.starts
    last = weights(made.model)
    low = [name for name in first if name.startswith("blocks.0.")]
    assert low and all(torch.equal(first[name], second[name]) for name in low)
    assert all(not torch.equal(second[name], last[name]) for name in low)
    assert not torch.equal(first["blocks.1.mlp.up.weight"], second["blocks.1.mlp.up.weight"])
    steps = {name: float(made.optimizer.state[weight]["step"]) for name, weight in made.model.named_parameters()}
    assert steps["blocks.0.mlp.up.weight"] == 3 and steps["blocks.1.mlp.up.weight"] == 6


def test_a_loss_of_ones_own_replaces_cross_entropy_and_sees_the_whole_window(train_with: Any) -> None:
    class Weighted:
        """Examples of even index weigh twice, normalised over the window."""

        name = "weighted"

        def loss(self, model: nn.Module, batch: Batch, window: list[Batch]) -> Tensor:
            targets = sum(each.targets for each in window)
            return 2.0 * LanguageHead(model).loss_sum(batch.tensors)[0] / targets

    plain = train_with(learning_rate=0.02)
    doubled = train_with(Weighted(), learning_rate=0.01)
    for name, weight in weights(plain.model).items():
        torch.testing.assert_close(weight, weights(doubled.model)[name], rtol=1e-5, atol=1e-7)


def test_a_methods_state_is_in_the_checkpoint_and_comes_back(train_with: Any, tmp_path: Path) -> None:
    class Counter:
        name = "counter"

        def __init__(self) -> None:
            self.steps, self.sum = 0, torch.zeros(2)

        def after_step(self, step: int) -> None:
            self.steps += 1
            self.sum += step

        def state(self) -> dict[str, Any]:
            return {"steps": self.steps, "sum": self.sum}

        def load_state(self, state: dict[str, Any]) -> None:
            self.steps, self.sum = state["steps"], state["sum"]

    whole = Counter()
    train_with(whole, folder=tmp_path / "run", save_every=4)
    last = tmp_path / "run" / "checkpoints" / "step-6"
    (last / "state.json").unlink()
    (tmp_path / "run" / "results.json").unlink()
    again = Counter()
    with pytest.warns(UserWarning, match="step-6 is skipped"):
        train_with(again, folder=tmp_path / "run", save_every=4, resume=True)
    assert (again.steps, again.sum.tolist()) == (whole.steps, whole.sum.tolist()) == (6, [21.0, 21.0])
