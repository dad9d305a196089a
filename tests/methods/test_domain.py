"""Examples of a domain and general ones, in exact shares."""

import json
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import pytest
import torch

from llmbuilder.errors import ConfigError
from llmbuilder.finetune import FineTuningConfig, sampler
from llmbuilder.methods import Domain, Key, Run

pytestmark = pytest.mark.filterwarnings("ignore:no validation data", "ignore:no general_dataset")


def drawn(weight: float, epochs: int, domain: int = 23, general: int = 7, seed: int = 0) -> list[list[list[Key]]]:
    method = Domain(weight)
    sources: Any = {"general": [{"input_ids": []}] * general}
    method.prepare(Run(torch.nn.Linear(1, 1), seed, sources, batch_size=4))
    return [list(method.batches(epoch, sampler.shuffled(domain, 4, seed, epoch))) for epoch in range(epochs)]


@pytest.mark.parametrize("weight", [0.7, 0.8, 0.5, 0.1, 1 / 3, 0.999, 1.0])
def test_adaptation_method_draws_exact_shares_after_every_example(weight: float) -> None:
    """Also from epoch to epoch: the formula in exact arithmetic, of the weight as it is written."""
    keys = [key for plan in drawn(weight, 5) for batch in plan for key in batch]
    of_domain, exact = 0, Fraction(str(weight))
    for n, (source, _) in enumerate(keys, start=1):
        of_domain += source == "train"
        assert of_domain == floor(exact * n + Fraction(1, 2)), n
    assert abs(of_domain / len(keys) - weight) < 0.02


@pytest.mark.parametrize("weight", [0.7, 0.45])
def test_an_epoch_goes_through_the_training_data_and_all_have_the_same_length(weight: float) -> None:
    epochs = drawn(weight, 8)
    assert len({len(plan) for plan in epochs}) == 1
    assert all({len(batch) for batch in plan[:-1]} == {4} for plan in epochs)
    for plan in epochs:
        domain = [index for batch in plan for source, index in batch if source == "train"]
        assert len(set(domain)) >= 22 and len(domain) - len(set(domain)) <= 1
    assert [key for batch in epochs[0] for key in batch] != [key for batch in epochs[1] for key in batch]


def test_batches_are_whole_where_the_domain_has_too_few_examples_for_one() -> None:
    (plan,) = drawn(0.1, 1, domain=3)
    assert [len(batch) for batch in plan] == [4] * 7 + [2]  # 3 of 30 are of the domain


def test_general_examples_all_come_before_any_comes_again() -> None:
    general = [index for plan in drawn(0.5, 4) for batch in plan for source, index in batch if source == "general"]
    turns = [general[start : start + 7] for start in range(0, len(general) - 6, 7)]
    assert len(turns) > 8 and all(sorted(turn) == list(range(7)) for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1
    assert drawn(0.5, 2, seed=1) != drawn(0.5, 2) == drawn(0.5, 2)


def test_the_texts_of_a_checkpoint_are_drawn_from_also_where_others_were_sampled_since() -> None:
    """More of them or fewer: the file that keeps them may be gone, and the machine another one."""
    plans = []
    for sampled in (2, 5, 9):
        texts, method = [{"input_ids": []}] * sampled, Domain(0.5)
        method.prepare(Run(torch.nn.Linear(1, 1), 0, {"general": texts}, batch_size=4))
        texts[:] = [{"input_ids": []}] * 5  # as General.load_state does
        plans.append(list(method.batches(0, sampler.shuffled(23, 4, 0, 0))))
    assert plans[0] == plans[1] == plans[2]


def test_a_run_trains_on_both_and_the_domain_names_results_and_cache(
    make_gpt: Any, make_rows: Any, tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of general data that are given; and of text that the base model makes, which the cache keeps by the name."""
    monkeypatch.setenv("LLMBUILDER_CACHE", str(tmp_path / "cache"))
    rows, general = make_rows(14, low=0, high=10), make_rows(6, seed=1, low=20)
    tuner = tune(make_gpt(), rows, domain_weight=0.7, general_dataset=general, output_dir=tmp_path / "run")
    targets = sum(row["tokens"] for row in tuner.results.history)
    own = sum(len(row["input_ids"]) - 1 for row in rows)
    assert tuner.results.steps == 5 and targets > own
    assert not (tmp_path / "cache").exists()
    assert json.loads((tmp_path / "run" / "results.json").read_text())["domain"] is None

    settings = {"domain": "medical", "domain_weight": 0.8, "general_tokens": 200}
    named = tune(make_gpt(), rows, **settings, output_dir=tmp_path / "named")
    assert named.results.domain == "medical"
    assert json.loads((tmp_path / "named" / "results.json").read_text())["domain"] == "medical"
    (file,) = (tmp_path / "cache").iterdir()
    assert file.name.startswith("medical-")
    text = named.run.general
    assert text is not None and 150 < sum(len(text[i]["input_ids"]) for i in range(len(text))) <= 200


def test_general_examples_hold_general_loss_down(make_gpt: Any, tune: Any) -> None:
    """What the weight is for: with the same domain examples, the run that sees general ones too forgets less."""

    def counting(by: int) -> list[dict[str, list[int]]]:
        rows = [[(start + by * n) % 31 for n in range(9)] for start in range(31)]
        return [{"input_ids": row, "labels": row} for row in rows]

    base = tune(make_gpt(), counting(1), num_epochs=30).model.state_dict()

    def losses(**settings: Any) -> tuple[float, float]:
        model = make_gpt()
        model.load_state_dict(base)
        tuner = tune(model, counting(3), num_epochs=6, **settings)
        return tuner.evaluate(counting(3)).loss, tuner.evaluate(counting(1)).loss

    (plain, forgotten), (mixed, kept) = losses(), losses(domain_weight=0.6, general_dataset=counting(1))
    assert mixed < plain + 0.4 and kept < 0.5 * forgotten


def test_what_is_said_implies_the_method() -> None:
    for settings in ({"domain": "law"}, {"domain_weight": 0.6}, {"preserve_general_knowledge": True}):
        config = FineTuningConfig(**settings)
        assert config.adaptation_method == "domain"
        assert config.domain_weight == settings.get("domain_weight", 0.7)
        assert FineTuningConfig(**config.resolved()) == config
    plain = FineTuningConfig()
    assert plain.adaptation_method is None and plain.domain_weight is None
    assert FineTuningConfig(adaptation_method="domain").domain_weight == 0.7


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"domain_weight": 0}, "greater than 0"),
        ({"domain_weight": 1.5}, "less than or equal to 1"),
        ({"adaptation_method": "style"}, "should be 'domain'"),
        ({"domain": ""}, "at least 1 character"),
        ({"domain": "../law"}, "names files"),
        ({"domain_weight": 1, "preserve_general_knowledge": True}, "leaves no general examples"),
        ({"preserve_general_knowledge": True, "data_collator": "packing"}, "mixes them with others"),
    ],
)
def test_what_means_nothing_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        FineTuningConfig(**settings)


def test_adaptation_method_with_a_penalty_drifts_less_at_equal_domain_loss(
    make_gpt: Any, make_rows: Any, tune: Any, weights: Any
) -> None:
    """Where the run without it has come as low, earlier on its way, it has gone further."""
    rows, general = make_rows(24, low=0, high=8), make_rows(12, seed=1, low=20)
    start = weights(make_gpt())

    def course(strength: float) -> list[tuple[float, float]]:
        """(domain loss, drift) along the way."""
        points = []
        for epochs in (2, 4, 8, 12):
            settings = {"domain_weight": 0.8, "general_dataset": general, "regularization_strength": strength}
            tuner = tune(make_gpt(), rows, **settings, num_epochs=epochs, learning_rate=3e-3, weight_decay=0.0)
            drift = sum(float((w - start[n]).pow(2).sum()) for n, w in weights(tuner.model).items())
            points.append((tuner.evaluate(rows).loss, drift))
        return points

    held, (loss, drift) = course(0.02), course(0.0)[-1]
    assert any(other <= loss + 0.05 and moved < 0.9 * drift for other, moved in held), (held, loss, drift)
