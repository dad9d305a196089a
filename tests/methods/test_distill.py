"""KL to the frozen self, on the general examples of a batch."""

import copy
import shutil
from typing import Any

import pytest
import torch

from llmbuilder.data import collate
from llmbuilder.errors import ConfigError
from llmbuilder.methods import Batch, Full, GeneralKnowledge, LoRA, Run
from llmbuilder.nn import LanguageHead, LoRAConfig
from llmbuilder.nn import heads as heads_module

pytestmark = pytest.mark.filterwarnings("ignore:no validation data")


def a_batch(rows: list[Any], sources: list[str]) -> Batch:
    tensors = collate(rows)
    return Batch(tensors, [(source, i) for i, source in enumerate(sources)], int((tensors["labels"][:, 1:] >= 0).sum()))


def kl(base: Any, tuned: Any, rows: list[Any]) -> tuple[torch.Tensor, int]:
    """The definition, in fp64, row by row, without padding."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        p, q = (model(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for model in (base, tuned))
        kept = torch.tensor(row["labels"][1:]) >= 0
        total = total + (p.exp() * (p - q)).sum(-1)[kept].sum()
        count += int(kept.sum())
    return total, count


@pytest.mark.parametrize("use_lora", [True, False])
@pytest.mark.parametrize("chunk", [3, 8192])
def test_preserve_general_knowledge_adds_the_mean_divergence_of_general_targets(
    make_gpt: Any, make_rows: Any, monkeypatch: pytest.MonkeyPatch, use_lora: bool, chunk: int
) -> None:
    """Value and gradient equal the formula in fp64, over a window of two batches, chunk by chunk."""
    monkeypatch.setattr(heads_module, "chunk_rows", lambda *_: chunk)
    base = make_gpt(n_embd=32)
    model = copy.deepcopy(base)
    run = Run(model)
    method = GeneralKnowledge()
    for each in (LoRA(LoRAConfig(rank=4, target_modules="all")) if use_lora else Full(), method):
        each.prepare(run)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn_like(weight)
    rows = make_rows(7)
    rows[1]["labels"][:4] = [-100] * 4
    window = [
        a_batch(rows[:4], ["general", "general", "train", "general"]),
        a_batch(rows[4:], ["train"] * 2 + ["general"]),
    ]
    general = [rows[0], rows[1], rows[3], rows[6]]

    terms = [method.extra_loss(model, batch, window) for batch in window]
    assert all(term is not None for term in terms)
    loss = terms[0] + terms[1]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    found = torch.autograd.grad(loss, trained)

    exact = copy.deepcopy(model).double()
    total, count = kl(base.double(), exact, general)
    assert (
        float(loss.detach()) == pytest.approx(float(total.detach() / count), rel=1e-4) and float(loss.detach()) > 2e-3
    )
    wanted = torch.autograd.grad(total / count, [weight for weight in exact.parameters() if weight.requires_grad])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-7)


def test_a_batch_without_general_examples_adds_nothing_and_the_start_none_of_it(make_gpt: Any, make_rows: Any) -> None:
    model, method, rows = make_gpt(), GeneralKnowledge(), make_rows(3)
    for each in (LoRA(LoRAConfig(rank=2)), method):
        each.prepare(Run(model))
    plain = a_batch(rows, ["train"] * 3)
    assert method.extra_loss(model, plain, [plain]) is None
    general = a_batch(rows, ["general", "train", "general"])
    assert abs(float(method.extra_loss(model, general, [general, plain]))) < 1e-6


def test_with_adapters_there_is_no_second_copy_and_dropout_does_not_touch_the_base(
    make_gpt: Any, make_rows: Any
) -> None:
    """The base is judged in evaluation mode while the tuned model trains, and modes are as before."""
    model = make_gpt(dropout=0.4)
    method = GeneralKnowledge()
    for each in (LoRA(LoRAConfig(rank=2, dropout=0.5)), method):
        each.prepare(Run(model))
    owned = {id(weight) for weight in model.parameters()}
    mine = [value.model for value in vars(method).values() if isinstance(value, LanguageHead)]
    assert mine and all({id(weight) for weight in held.parameters()} == owned for held in mine)
    batch = a_batch(make_rows(2), ["general"] * 2)
    model.train()
    seen = []
    target_states = LanguageHead.target_states

    def spy(self: Any, tensors: Any) -> Any:
        seen.append((self.model.training, model.blocks[0].attention.query.state.enabled))
        return target_states(self, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageHead, "target_states", spy)
        method.extra_loss(model, batch, [batch])
    assert seen == [(False, False), (True, True)] and model.training


@pytest.mark.parametrize("use_lora", [True, False])
def test_general_loss_rises_less_at_matched_domain_loss(
    make_gpt: Any, make_rows: Any, tune: Any, use_lora: bool
) -> None:
    """What it is for. The few general examples begin sequences that the model knows; the probe is the rest of them,
    which no label says and only the base's own distribution can hold."""
    rows = make_rows(32, low=0, high=8)
    known = [{"input_ids": row, "labels": row} for row in ([*range(t, t + 9)] for t in range(8, 22))]
    base = tune(make_gpt(), known, num_epochs=40).model.state_dict()
    general = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in known[::2]]
    settings = {"target_modules": "all", "lora_rank": 4} if use_lora else {"use_lora": False}

    def trained(preserve: bool) -> tuple[float, float]:
        model = make_gpt()
        model.load_state_dict(base)
        settings_now = settings | {"num_epochs": 6, "domain_weight": 0.6, "preserve_general_knowledge": preserve}
        tuner = tune(model, rows, **settings_now, general_dataset=general)
        before = make_gpt()
        before.load_state_dict(base)
        with torch.no_grad():
            total, count = kl(before, tuner.model, known)
        return tuner.evaluate(rows).loss, float(total / count)

    (plain, drifted), (kept, stayed) = trained(False), trained(True)
    assert kept < plain + 0.1 and stayed < 0.7 * drifted


def test_the_divergence_is_in_the_log_and_a_resumed_run_repeats_it(
    make_gpt: Any, make_rows: Any, tune: Any, weights: Any, tmp_path: Any
) -> None:
    settings = {"preserve_general_knowledge": True, "general_dataset": make_rows(5, seed=1), "lora_rank": 2}
    settings |= {"save_every": 2, "output_dir": tmp_path / "run", "lora_dropout": 0.3, "num_epochs": 2}
    whole = tune(make_gpt(), make_rows(8), **settings)
    extra = [row["extra_loss"] for row in whole.results.history]
    assert extra[-1] > 1e-4
    for step in range(whole.results.steps - 1, whole.results.steps + 1):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step}", ignore_errors=True)
    (tmp_path / "run" / "results.json").unlink()
    again = tune(make_gpt(), make_rows(8), **settings, resume=True)
    assert all(torch.equal(weights(whole.model)[name], value) for name, value in weights(again.model).items())
    assert [row["extra_loss"] for row in again.results.history] == extra


def test_a_copy_of_another_base_is_refused_on_resume(make_gpt: Any) -> None:
    """Where all weights train, the checkpoint brings those of the tuned model, and none of the base."""
    methods = []
    for seed in (0, 1):
        run = Run(make_gpt(seed=seed))
        methods.append(GeneralKnowledge())
        for each in (Full(), methods[-1]):
            each.prepare(run)
    methods[0].load_state(methods[0].state())
    with pytest.raises(ConfigError, match="another base model: resume with the model it had"):
        methods[1].load_state(methods[0].state())


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_base_that_is_stored_in_bf16_starts_at_no_divergence(
    make_gpt: Any, make_rows: Any, tune: Any, dtype: str
) -> None:
    """Weights that train do so in fp32: so does what they are compared with."""
    settings = {"use_lora": False, "dtype": dtype, "max_steps": 1, "domain_weight": 0.5}
    general = {"preserve_general_knowledge": True, "general_dataset": make_rows(4, seed=1)}
    model = make_gpt()
    with torch.no_grad():  # so large that rounding in bf16 would show
        for weight in model.parameters():
            weight.mul_(4.0)
    tuner = tune(model.to(torch.bfloat16), make_rows(4), **settings, **general)
    assert abs(tuner.results.history[0]["extra_loss"]) < 1e-9
