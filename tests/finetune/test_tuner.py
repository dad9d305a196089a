"""The loop against a loop written by hand and against transformers' Trainer; what each setting does."""

import json
import math
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from llmbuilder.data import Collator, TokenDataset, collate
from llmbuilder.errors import ConfigError, LLMBuilderError
from llmbuilder.finetune import FineTuner, FineTuningConfig, finetune_model
from llmbuilder.finetune.sampler import shuffled
from llmbuilder.methods import Batch, Full, Methods
from llmbuilder.models import byte_tokenizer, load_model
from llmbuilder.nn import LoRAConfig, add_lora

pytestmark = pytest.mark.filterwarnings("ignore:no validation data")

MakeModel = Callable[..., nn.Module]
Make = Callable[..., Any]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


def losses(results: Any) -> list[float]:
    return [row["loss"] for row in results.history]


def mean_loss(model: nn.Module, examples: list[Any]) -> Tensor:
    """Cross-entropy over all targets of some examples, one at a time and unpadded: nothing of the library in it."""
    total, count = torch.zeros(()), 0
    for example in examples:
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])[1:]
        logits = model(input_ids=ids).logits[0, :-1].float()
        total = total + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    return total / count


def in_order_of(plan: list[list[tuple[str, int]]], examples: list[Any]) -> list[list[Any]]:
    return [[examples[index] for _, index in keys] for keys in plan]


class Spy:
    """A method that only looks: the gradients of each step, before they are clipped."""

    name = "spy"

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.gradients: list[dict[str, Tensor]] = []
        self.windows: list[list[int]] = []

    def extra_loss(self, model: nn.Module, batch: Batch, window: list[Batch]) -> None:
        if batch is window[0]:
            self.windows.append([len(each.keys) for each in window])

    def penalty(self) -> float:
        found = {name: weight.grad.clone() for name, weight in self.model.named_parameters() if weight.grad is not None}
        self.gradients.append(found)
        return 0.0


def spied(tuner: FineTuner) -> Spy:
    spy = Spy(tuner.model)
    tuner.methods = Methods([Full(), spy])
    return spy


def assert_relative(found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        error, size = float((found[name] - value).norm()), float(value.norm())
        assert error <= bound * size, f"{name}: {error} against {size}"


# Against independent loops


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 1e-3), ("sgd", 0.1)])
def test_full_fine_tuning_equals_transformers_trainer(
    make_examples: Make, make_config: Make, tmp_path: Path, optimizer: str, rate: float
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    shape = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        use_cache=False,
    )
    torch.manual_seed(0)
    ours, theirs = LlamaForCausalLM(shape), LlamaForCausalLM(shape)
    theirs.load_state_dict(ours.state_dict())
    examples = make_examples(44, seed=3)
    config = make_config(
        optimizer=optimizer,
        learning_rate=rate,
        scheduler="linear",
        weight_decay=0.01,
        max_grad_norm=1.0,
        max_steps=20,
        seed=5,
    )
    ordered = [e for epoch in range(2) for batch in in_order_of(shuffled(44, 4, 5, epoch), examples) for e in batch]
    first: dict[str, Tensor] = {}
    seen: list[float] = []

    class Recorder(TrainerCallback):
        """The first step's gradients, clipped already."""

        def on_pre_optimizer_step(self, *args: Any, **state: Any) -> None:
            if not first:
                first.update({name: weight.grad.clone() for name, weight in theirs.named_parameters()})

    class Exact(Trainer):
        """The same batches in the same order, and losses before they are rounded for the log."""

        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(ordered)

        def training_step(self, *args: Any, **more: Any) -> Tensor:
            loss = super().training_step(*args, **more)
            seen.append(float(loss))
            return loss

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=20,
        learning_rate=rate,
        weight_decay=0.01,
        optim="adamw_torch" if optimizer == "adamw" else "sgd",
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    Exact(model=theirs, args=arguments, train_dataset=ordered, data_collator=Collator(), callbacks=[Recorder()]).train()

    tuner = FineTuner(ours, examples, config=config)
    spy = spied(tuner)
    results = tuner.train()
    scale = min(1.0, 1.0 / (results.history[0]["grad_norm"] + 1e-6))
    assert_relative({name: scale * gradient for name, gradient in spy.gradients[0].items()}, first, 1e-5)
    assert len(seen) == len(results.history) == 20
    assert losses(results) == pytest.approx(seen, rel=1e-5)
    assert losses(results)[-1] < losses(results)[0]
    assert_relative(weights(ours), weights(theirs), 1e-4)


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 1e-3), ("sgd", 0.1)])
def test_lora_equals_a_plain_torch_loop(
    make_gpt: MakeModel, make_examples: Make, make_config: Make, optimizer: str, rate: float
) -> None:
    examples = make_examples(10)
    lora = LoRAConfig(rank=4, target_modules="all", dropout=0.0)
    config = make_config(
        use_lora=True,
        lora_config=lora,
        optimizer=optimizer,
        learning_rate=rate,
        weight_decay=0.1,
        seed=9,
        max_grad_norm=0.5,
    )
    ours = make_gpt()
    results = FineTuner(ours, examples, config=config).train()

    model = make_gpt()
    torch.manual_seed(9)
    add_lora(model, lora)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    plain = kind(trained, lr=rate, weight_decay=0.1)
    wanted = []
    for epoch in range(2):
        for batch in in_order_of(shuffled(10, 4, 9, epoch), examples):
            loss = mean_loss(model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 0.5)
            plain.step()
            plain.zero_grad()
            wanted.append(float(loss.detach()))
    assert losses(results) == pytest.approx(wanted, rel=1e-5)
    assert len(wanted) == 6
    assert_relative(weights(ours), weights(model), 1e-4)


def test_the_first_gradient_is_that_of_the_mean_over_the_steps_targets(
    make_gpt: MakeModel, make_examples: Make, make_config: Make
) -> None:
    examples = make_examples(8)
    model = make_gpt()
    mean_loss(model, examples).backward()
    wanted = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    for batch_size, window in ((8, 1), (1, 8), (3, 3)):
        tuner = FineTuner(
            make_gpt(),
            examples,
            config=make_config(batch_size=batch_size, gradient_accumulation_steps=window, num_epochs=1),
        )
        spy = spied(tuner)
        tuner.train()
        assert len(spy.gradients) == 1
        assert_relative(spy.gradients[0], wanted, 1e-5)


# Steps, epochs, windows


def test_a_last_short_window_steps_too(make_gpt: MakeModel, make_examples: Make, make_config: Make) -> None:
    tuner = FineTuner(make_gpt(), make_examples(11), config=make_config(batch_size=2, gradient_accumulation_steps=4))
    spy = spied(tuner)
    results = tuner.train()
    assert spy.windows == [[2, 2, 2, 2], [2, 1]] * 2
    assert [row["epoch"] for row in results.history] == pytest.approx([4 / 6, 1, 10 / 6, 2])
    assert [row["step"] for row in results.history] == [1, 2, 3, 4]


@pytest.mark.parametrize("steps", [3, 11])
def test_max_steps_overrides_the_epochs(
    make_gpt: MakeModel, make_examples: Make, make_config: Make, steps: int
) -> None:
    config = make_config(num_epochs=2, max_steps=steps, scheduler="linear")
    results = FineTuner(make_gpt(), make_examples(12), config=config).train()
    assert results.steps == steps == len(results.history)
    wanted = [1e-3 * (1 - step / steps) for step in range(steps)]
    assert [row["lr"] for row in results.history] == pytest.approx(wanted)


def test_the_gradient_is_clipped_and_its_norm_reported(
    make_gpt: MakeModel, make_examples: Make, make_config: Make
) -> None:
    examples = make_examples(4)
    settings = {"optimizer": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "max_steps": 1}
    moved = {}
    for bound in (None, 0.25):
        model = make_gpt()
        before = weights(model)
        results = FineTuner(model, examples, config=make_config(max_grad_norm=bound, **settings)).train()
        squares = sum(float((weight - before[name]).double().pow(2).sum()) for name, weight in weights(model).items())
        moved[bound] = math.sqrt(squares), results.history[0]["grad_norm"]
    assert moved[None][0] == pytest.approx(moved[None][1], rel=1e-3)
    assert moved[None][1] == pytest.approx(moved[0.25][1], rel=1e-6)
    assert moved[0.25][0] == pytest.approx(0.25, rel=1e-3)


def test_a_seed_repeats_a_run_bit_for_bit_and_another_one_does_not(
    make_gpt: MakeModel, make_examples: Make, make_config: Make
) -> None:
    found = []
    for seed in (1, 1, 2):
        torch.rand(len(found))  # whatever was drawn before does not matter
        model = make_gpt(dropout=0.2)
        FineTuner(model, make_examples(10), config=make_config(seed=seed)).train()
        found.append(weights(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(found[0]["norm.weight"], found[2]["norm.weight"])


def test_training_leaves_the_callers_random_state_alone(
    make_gpt: MakeModel, make_examples: Make, make_config: Make
) -> None:
    state = torch.get_rng_state()
    FineTuner(make_gpt(dropout=0.1), make_examples(4), config=make_config(use_lora=True, max_steps=1)).train()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_long_form_equals_the_short_one_bit_for_bit(
    make_gpt: MakeModel, make_examples: Make, make_config: Make
) -> None:
    config, long, short = make_config(use_lora=True, lora_dropout=0.1), make_gpt(), make_gpt()
    wanted = FineTuner(long, make_examples(10), None, config).train()
    results = finetune_model(short, make_examples(10), config)
    assert all(torch.equal(value, weights(short)[name]) for name, value in weights(long).items())
    assert (results.final_perplexity, losses(results)) == (wanted.final_perplexity, losses(wanted))


def test_a_tuner_trains_once(make_gpt: MakeModel, make_examples: Make, make_config: Make) -> None:
    tuner = FineTuner(make_gpt(), make_examples(4), config=make_config(max_steps=1))
    tuner.train()
    with pytest.raises(LLMBuilderError, match="has trained already"):
        tuner.train()


# What trains


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_frozen_weights_keep_their_bits_under_weight_decay(
    make_gpt: MakeModel, make_examples: Make, make_config: Make, lora: bool, tie: bool
) -> None:
    model = make_gpt(n_layer=3, tie_word_embeddings=tie)
    chosen = {"use_lora": True, "target_modules": "all"} if lora else {}
    config = make_config(freeze_embeddings=True, freeze_layers=2, weight_decay=0.5, **chosen)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tuner = FineTuner(model, make_examples(8), config=config)
    before = weights(model)
    tuner.train()
    moved = changed(model, before)
    said = any("freezes the output head too" in str(warning.message) for warning in told)
    if lora:
        assert moved and all("lora" in name and name.startswith("blocks.2.") for name in moved)
        assert not said
        return
    kept = {name for name in before if name.startswith(("embedding.", "blocks.0.", "blocks.1."))}
    assert moved == before.keys() - kept
    assert ("head.weight" in moved) is not tie
    assert said is tie


def test_lora_trains_its_adapters_and_nothing_else(make_gpt: MakeModel, make_examples: Make, make_config: Make) -> None:
    model = make_gpt()
    base = {id(weight) for weight in model.parameters()}
    tuner = FineTuner(model, make_examples(8), config=make_config(lora_rank=2, use_lora=True, weight_decay=0.5))
    before = weights(model)
    adapters = {name for name, weight in model.named_parameters() if id(weight) not in base}
    tuner.train()
    assert adapters and changed(model, before) == adapters


def test_nothing_left_to_train_is_an_error(make_gpt: MakeModel, make_examples: Make, make_config: Make) -> None:
    config = make_config(use_lora=True, target_modules=["attention.query"], freeze_layers=2)
    with pytest.raises(ConfigError, match="nothing is left to train"):
        FineTuner(make_gpt(), make_examples(4), config=config)


def test_bf16_trains_fp32_weights_beside_frozen_bf16_ones(
    make_gpt: MakeModel, make_examples: Make, make_config: Make
) -> None:
    plain = FineTuner(make_gpt(), make_examples(8), config=make_config(use_lora=True, lora_rank=4)).train()
    model = make_gpt()
    tuner = FineTuner(model, make_examples(8), config=make_config(use_lora=True, lora_rank=4, dtype="bf16"))
    results = tuner.train()
    kinds = {(weight.requires_grad, weight.dtype) for weight in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    states = [value for state in tuner.optimizer.state.values() for value in state.values()]
    assert states and {value.dtype for value in states} == {torch.float32}
    assert losses(results) == pytest.approx(losses(plain), rel=0.02)
    assert losses(results) != losses(plain)


def test_full_bf16_keeps_fp32_masters(make_gpt: MakeModel, make_examples: Make, make_config: Make) -> None:
    seen: list[torch.dtype] = []
    model = make_gpt()
    model.blocks[0].mlp.up.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    results = FineTuner(model, make_examples(8), config=make_config(dtype="bf16", freeze_layers=1)).train()
    assert set(seen) == {torch.bfloat16}
    assert {weight.dtype for weight in model.blocks[1].parameters()} == {torch.float32}
    assert {weight.dtype for weight in model.blocks[0].parameters()} == {torch.bfloat16}
    assert losses(results)[-1] < losses(results)[0]


def test_dropout_acts_in_training_and_not_in_evaluation(
    make_gpt: MakeModel, make_examples: Make, make_config: Make
) -> None:
    data = make_examples(8)
    runs = [
        FineTuner(make_gpt(), data, config=make_config(max_steps=1, **more)) for more in ({}, {"dropout_rate": 0.3})
    ]
    plain, dropped = [tuner.train() for tuner in runs]
    assert plain.base_perplexity == dropped.base_perplexity
    assert losses(plain)[0] != losses(dropped)[0]


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_changes_no_gradient_with_dropout_on(
    make_gpt: MakeModel, make_examples: Make, make_config: Make, lora: bool
) -> None:
    chosen = {"use_lora": True, "lora_dropout": 0.2} if lora else {"dropout_rate": 0.2}
    found = []
    for checkpointing in (False, True):
        config = make_config(gradient_checkpointing=checkpointing, max_steps=1, **chosen)
        tuner = FineTuner(make_gpt(), make_examples(8), config=config)
        calls: list[int] = []
        tuner.model.blocks[0].attention.query.register_forward_hook(
            lambda *_, calls=calls: calls.append(torch.is_grad_enabled())
        )
        spy = spied(tuner)
        tuner.train()
        found.append((spy.gradients[0], sum(calls)))
    assert_relative(found[1][0], found[0][0], 1e-6)
    assert found[1][1] == 2 * found[0][1]  # computed again in the backward pass


# Data


def test_packed_rows_give_the_losses_of_padded_ones(
    make_gpt: MakeModel, make_examples: Make, make_config: Make
) -> None:
    examples = make_examples(12, longest=10)
    for example in examples:
        example["labels"][0] = -100
    found, rows = [], []
    for collator in ("default", "packing"):
        tuner = FineTuner(make_gpt(), examples, config=make_config(data_collator=collator, max_seq_length=32))
        tuner.head.model.embedding.register_forward_hook(lambda m, i, o: rows.append(o.shape[0]))
        found.append(losses(tuner.train()))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    half = len(rows) // 2
    assert sum(rows[half:]) < sum(rows[:half])


def test_workers_give_the_same_run(make_gpt: MakeModel, make_examples: Make, make_config: Make) -> None:
    found = [
        losses(FineTuner(make_gpt(), make_examples(8), config=make_config(dataloader_num_workers=n)).train())
        for n in (0, 1)
    ]
    assert found[0] == found[1]


def test_examples_beyond_the_models_context_are_refused(
    make_gpt: MakeModel, make_examples: Make, make_config: Make
) -> None:
    with pytest.raises(LLMBuilderError, match="40 tokens, the model's context 32"):
        FineTuner(make_gpt(), make_examples(3, shortest=40, longest=40), config=make_config())
    with pytest.raises(LLMBuilderError, match="no examples"):
        FineTuner(make_gpt(), [], config=make_config())


# Evaluation and early stopping


def test_perplexities_are_those_of_the_validation_set(
    make_gpt: MakeModel, make_examples: Make, make_config: Make
) -> None:
    train, val = make_examples(12), make_examples(7, seed=1)
    model = make_gpt()
    with torch.no_grad():
        base = math.exp(mean_loss(model, val))
    results = FineTuner(model, train, val, make_config()).train()
    with torch.no_grad():
        final = math.exp(mean_loss(model, val))
    assert results.evaluated_on == "validation"
    assert results.base_perplexity == pytest.approx(base, rel=1e-5)
    assert results.final_perplexity == pytest.approx(final, rel=1e-5)
    assert results.improvement_percentage == pytest.approx(100 * (base - final) / base, rel=1e-3)
    assert isinstance(results.training_time, timedelta) and results.training_time > timedelta()


def test_without_validation_data_the_training_data_are_used_and_that_is_said(
    make_gpt: MakeModel, make_examples: Make, make_config: Make
) -> None:
    data = make_examples(12)
    model = make_gpt()
    with pytest.warns(UserWarning, match="no validation data: perplexity is that of the training data itself"):
        tuner = FineTuner(model, data, config=make_config(eval_every=2))
    results = tuner.train()
    with torch.no_grad():
        assert results.final_perplexity == pytest.approx(math.exp(mean_loss(model, data)), rel=1e-5)
    assert results.evaluated_on == "training"
    assert [row["step"] for row in results.history if "eval_loss" in row] == [6]


def test_a_share_is_held_out_and_never_trained_on(make_gpt: MakeModel, make_examples: Make, make_config: Make) -> None:
    model = make_gpt(vocab_size=258)
    model.tokenizer = byte_tokenizer()
    data = TokenDataset(make_examples(20))
    tuner = FineTuner(model, data, config=make_config(validation_split=0.25))
    train, val = tuner.run.sources["train"], tuner.val_dataset
    assert (len(train), len(val)) == (15, 5)
    seen = [str(part[i]) for part in (train, val) for i in range(len(part))]
    assert sorted(seen) == sorted(str(data[i]) for i in range(20))
    results = tuner.train()
    assert results.evaluated_on == "held out"
    with torch.no_grad():
        wanted = math.exp(mean_loss(model, [val[i] for i in range(5)]))
    assert results.final_perplexity == pytest.approx(wanted, rel=1e-5)


def test_two_sources_of_validation_data_contradict(make_gpt: MakeModel, make_examples: Make, make_config: Make) -> None:
    with pytest.raises(ConfigError, match=r"validation_split=0\.5 has no effect beside a val_dataset"):
        FineTuner(make_gpt(), make_examples(4), make_examples(4), make_config(validation_split=0.5))


def test_evaluations_come_every_so_many_steps_and_at_the_end(
    make_gpt: MakeModel, make_examples: Make, make_config: Make
) -> None:
    config = make_config(num_epochs=3, eval_every=4)
    results = FineTuner(make_gpt(), make_examples(12), make_examples(4, seed=1), config).train()
    found = {row["step"]: row for row in results.history if "eval_loss" in row}
    assert list(found) == [4, 8, 9]
    for row in found.values():
        assert row["eval_perplexity"] == pytest.approx(math.exp(row["eval_loss"]))
        assert 0 <= row["eval_accuracy"] <= 1
    assert results.final_perplexity == found[9]["eval_perplexity"]


def test_evaluating_does_not_disturb_training(make_gpt: MakeModel, make_examples: Make, make_config: Make) -> None:
    found = []
    for every in (None, 1):
        config = make_config(eval_every=every, dropout_rate=0.3)
        found.append(losses(FineTuner(make_gpt(), make_examples(12), make_examples(4, seed=1), config).train()))
    assert found[0] == found[1]


def test_early_stopping_restores_the_best_weights(make_gpt: MakeModel, make_examples: Make, make_config: Make) -> None:
    val = make_examples(6, seed=1)
    model = make_gpt()
    config = make_config(learning_rate=0.03, num_epochs=50, eval_every=2, early_stopping_patience=3)
    results = FineTuner(model, make_examples(12), val, config).train()
    found = {row["step"]: row["eval_loss"] for row in results.history if "eval_loss" in row}
    best = min(found, key=lambda step: found[step])
    assert results.steps == best + 3 * 2 < 150
    assert results.best_step == best
    assert results.final_perplexity == pytest.approx(math.exp(found[best]))
    with torch.no_grad():
        assert float(mean_loss(model, val)) == pytest.approx(found[best], rel=1e-5)


def test_patience_without_a_stop_still_keeps_the_best_weights(
    make_gpt: MakeModel, make_examples: Make, make_config: Make
) -> None:
    val = make_examples(6, seed=1)
    model = make_gpt()
    config = make_config(learning_rate=0.03, max_steps=14, eval_every=2, early_stopping_patience=100)
    results = FineTuner(model, make_examples(12), val, config).train()
    found = {row["step"]: row["eval_loss"] for row in results.history if "eval_loss" in row}
    best = min(found, key=lambda step: found[step])
    assert best < 14 == results.steps and results.best_step == best
    with torch.no_grad():
        assert float(mean_loss(model, val)) == pytest.approx(found[best], rel=1e-5)


def test_early_stopping_without_validation_data_watches_the_training_data(
    make_gpt: MakeModel, make_examples: Make, make_config: Make
) -> None:
    config = make_config(eval_every=2, early_stopping_patience=3)
    results = FineTuner(make_gpt(), make_examples(12), config=config).train()
    assert [row["step"] for row in results.history if "eval_loss" in row] == [2, 4, 6]


# Errors


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_no_adapter(
    make_gpt: MakeModel, make_examples: Make, make_config: Make, tmp_path: Path
) -> None:
    config = make_config(use_lora=True, output_dir=tmp_path, save_every=2)
    tuner = FineTuner(make_gpt(), make_examples(16), config=config)

    class Poison:
        name = "poison"

        def after_step(self, step: int) -> None:
            if step == 3:
                with torch.no_grad():
                    tuner.model.norm.weight.fill_(float("nan"))

    tuner.methods = Methods([Poison()])
    with pytest.raises(LLMBuilderError, match=r"step 4: loss or gradient .*step-2, and resume .*lower learning_rate"):
        tuner.train()
    assert not (tmp_path / "adapter").exists() and not (tmp_path / "results.json").exists()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_full_disk_stops_the_run_with_a_word(
    make_gpt: MakeModel, make_examples: Make, make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = FineTuner(make_gpt(), make_examples(16), config=make_config(output_dir=tmp_path, save_every=2))

    class Full:
        name = "full disk"

        def after_step(self, step: int) -> None:
            if step == 4:
                monkeypatch.setattr(
                    "llmbuilder.finetune.checkpoint.save_file",
                    lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")),
                )

    tuner.methods = Methods([Full()])
    with pytest.raises(LLMBuilderError, match=r"step-4: cannot be saved .*No space left.*free some space"):
        tuner.train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_resume_and_overwrite_need_a_folder_and_exclude_each_other(
    make_gpt: MakeModel, make_examples: Make, make_config: Make, tmp_path: Path, how: str
) -> None:
    with pytest.raises(ConfigError, match=f"{how} needs an output_dir"):
        FineTuner(make_gpt(), make_examples(4), config=make_config(), **{how: True})
    with pytest.raises(ConfigError, match="contradict"):
        FineTuner(make_gpt(), make_examples(4), config=make_config(output_dir=tmp_path), resume=True, overwrite=True)


# The folder


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def test_without_a_folder_nothing_is_written(
    make_gpt: MakeModel, make_examples: Make, make_config: Make, inside: Path
) -> None:
    results = FineTuner(make_gpt(), make_examples(4), config=make_config(save_every=1)).train()
    assert results.history and list(inside.iterdir()) == []


def test_a_run_leaves_what_its_folder_should_hold(
    make_gpt: MakeModel, make_examples: Make, make_config: Make, tmp_path: Path
) -> None:
    model = make_gpt()
    config = make_config(output_dir=tmp_path / "run", save_every=2, num_epochs=1)
    results = FineTuner(model, make_examples(12), make_examples(4, seed=1), config).train()
    folder = tmp_path / "run"
    content = ["checkpoints", "config.yaml", "loss.png", "metrics.jsonl", "model", "past", "results.json"]
    content.append("tensorboard")
    assert sorted(path.name for path in folder.iterdir()) == content
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-2", "step-3"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == results.history
    assert rows[0].keys() == {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_s"}
    plan = shuffled(12, 4, 0, 0)
    counts = [
        sum(label != -100 for e in batch for label in e["labels"][1:]) for batch in in_order_of(plan, make_examples(12))
    ]
    assert [row["tokens"] for row in rows] == counts
    assert FineTuningConfig(**yaml.safe_load((folder / "config.yaml").read_text())) == config
    saved = json.loads((folder / "results.json").read_text())
    assert saved["final_perplexity"] == results.final_perplexity
    assert saved["training_time"] == results.training_time.total_seconds()
    assert results.training_time.total_seconds() > sum(row["tokens"] / row["tokens_per_s"] for row in rows) * 0.999
    again = load_model(folder / "model")
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(model).items())


def test_a_lora_run_leaves_an_adapter(
    make_gpt: MakeModel, make_examples: Make, make_config: Make, tmp_path: Path
) -> None:
    from llmbuilder.nn import load_adapter

    model, fresh = make_gpt(), make_gpt()
    FineTuner(model, make_examples(12), config=make_config(use_lora=True, lora_rank=3, output_dir=tmp_path)).train()
    assert not (tmp_path / "model").exists()
    load_adapter(fresh, tmp_path / "adapter")
    batch = collate(make_examples(2, seed=4))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        base = make_gpt()(**inputs).logits
        assert torch.equal(fresh.eval()(**inputs).logits, model(**inputs).logits)
        assert not torch.allclose(base, model(**inputs).logits)


def test_a_second_run_is_refused_and_overwriting_replaces_the_first(
    make_gpt: MakeModel, make_examples: Make, make_config: Make, tmp_path: Path
) -> None:
    long, short = (
        make_config(output_dir=tmp_path, num_epochs=3, save_every=1),
        make_config(output_dir=tmp_path, max_steps=2),
    )
    FineTuner(make_gpt(), make_examples(8), config=long).train()
    with pytest.raises(LLMBuilderError, match="holds a run already"):
        FineTuner(make_gpt(), make_examples(8), config=short)
    FineTuner(make_gpt(), make_examples(8), config=short, overwrite=True).train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
