"""A loss that counts what a program means more than how it is laid out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llmbuilder.data import TaskDataset, TextDataset, code
from llmbuilder.errors import ConfigError, LLMBuilderError
from llmbuilder.finetune import FineTuningConfig, assemble
from llmbuilder.methods import CodeLoss, Run
from llmbuilder.methods.code_loss import WEIGHTS
from llmbuilder.models import byte_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:no validation data")
SOURCE = "def add(a, b):\n    return a + b  # sum\n\n\nx = [1, 'two']\n"


@pytest.fixture
def dataset(tmp_path: Path) -> Any:
    path = tmp_path / "a.py"
    path.write_text(SOURCE * 3)
    data = TextDataset(path, block_size=32)
    data.bind(byte_tokenizer(), FineTuningConfig())
    return data


def weighed(model: Any, data: Any, **settings: Any) -> Any:
    run = Run(model, sources={"train": data})
    CodeLoss("python", **settings).prepare(run)
    return run.sources["train"]


def test_code_specific_loss_weighs_by_lexical_class_and_keeps_the_mean_at_one(make_gpt: Any, dataset: Any) -> None:
    data = weighed(make_gpt(text=True), dataset)
    ids = [token for n in range(len(data)) for token in data[n]["input_ids"]]
    given = [weight for n in range(len(data)) for weight in data[n]["weights"]]
    text = bytes(ids).decode()
    assert text == SOURCE * 3
    targets = [weight for n in range(len(data)) for weight in data[n]["weights"][1:]]
    assert sum(targets) / len(targets) == pytest.approx(1, abs=1e-6)
    by_sign = {sign: {weight for at, weight in zip(text, given, strict=True) if at == sign} for sign in set(text)}
    full = by_sign["x"]
    assert len(full) == 1 and by_sign["a"] == by_sign["+"] == by_sign["1"] == full
    assert [by_sign["["], by_sign["\n"]] == [{w * 0.5 for w in full}, {w * 0.25 for w in full}]
    assert by_sign[" "] == {min(full) * 0.25, min(full)}, "also inside a comment"


def test_the_loss_and_its_gradient_are_the_weighted_ones(make_gpt: Any, dataset: Any, tune: Any) -> None:
    """One step of the loop against the formula in fp64."""
    settings = {"max_steps": 1, "batch_size": 64, "optimizer": "sgd", "learning_rate": 1.0, "weight_decay": 0.0}
    model = make_gpt(text=True)
    exact = make_gpt(text=True).double()
    tuner = tune(model, dataset, code_specific_loss=True, **settings)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for n in range(len(dataset)):
        row = tuner.run.sources["train"][n]
        ids, weights = torch.tensor([row["input_ids"]]), torch.tensor(row["weights"], dtype=torch.float64)
        losses = F.cross_entropy(exact(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        total, count = total + (losses * weights[1:]).sum(), count + len(losses)
    (total / count).backward()
    assert tuner.results.history[0]["loss"] == pytest.approx(float(total.detach() / count), rel=1e-5)
    for one, other in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(one.double(), other - other.grad, rtol=1e-4, atol=1e-6)


def test_equal_weights_are_plain_cross_entropy_bit_for_bit(
    make_gpt: Any, dataset: Any, tune: Any, monkeypatch: pytest.MonkeyPatch, weights: Any
) -> None:
    plain = tune(make_gpt(text=True), dataset, num_epochs=2)
    different = tune(make_gpt(text=True), dataset, num_epochs=2, code_specific_loss=True)
    monkeypatch.setattr(assemble, "CodeLoss", lambda language: CodeLoss(language, dict.fromkeys(WEIGHTS, 0.3)))
    equal = tune(make_gpt(text=True), dataset, num_epochs=2, code_specific_loss=True)
    assert "weights" in equal.run.sources["train"][0]
    wanted = weights(plain.model)
    assert all(torch.equal(wanted[name], weight) for name, weight in weights(equal.model).items())
    assert not torch.equal(wanted["head.weight" if "head.weight" in wanted else "embedding.weight"],
                           weights(different.model)["embedding.weight"])  # fmt: skip
    assert [row["loss"] for row in plain.results.history] == [row["loss"] for row in equal.results.history]


def test_only_answers_are_read_and_prompts_stay_out_of_the_mean(make_gpt: Any) -> None:
    rows = [{"prompt": "(((" * 5, "completion": "x\n"}]
    data = TaskDataset(rows, "code")
    data.bind(byte_tokenizer(), FineTuningConfig())
    found = weighed(make_gpt(text=True), data)[0]
    learnt = [w for w, label in zip(found["weights"], found["labels"], strict=True) if label != -100]
    assert len(learnt) >= 2 and sum(learnt) / len(learnt) == pytest.approx(1, abs=1e-6)


def test_evaluation_is_not_weighed(make_gpt: Any, dataset: Any, tune: Any) -> None:
    settings = {"learning_rate": 1e-30, "max_steps": 1}
    plain = tune(make_gpt(text=True), dataset, **settings)
    weighed = tune(make_gpt(text=True), dataset, **settings, code_specific_loss=True)
    assert plain.results.base_perplexity == weighed.results.base_perplexity


def test_a_model_without_a_tokenizer_is_refused(make_gpt: Any, make_rows: Any) -> None:
    with pytest.raises(LLMBuilderError, match="the model has no tokenizer"):
        weighed(make_gpt(), make_rows(2))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"code_specific_loss": True, "dialogue_format": True}, "read code"),
        ({"code_specific_loss": True, "task_type": "summarization"}, "read code, and task_type='summarization'"),
        ({"code_language": "python"}, "no effect without code_specific_loss or syntax_aware_training"),
    ],
)
def test_what_means_nothing_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        FineTuningConfig(**settings)
    assert set(WEIGHTS) == {
        code.NAME,
        code.LITERAL,
        code.KEYWORD,
        code.OPERATOR,
        code.COMMENT,
        code.PUNCTUATION,
        code.LAYOUT,
    }
