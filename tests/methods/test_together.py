"""Methods together: every pair trains and does what each does alone, or is refused; many at once resume bit for bit."""

import itertools
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmbuilder.data import MultiTaskDataset, TextDataset
from llmbuilder.errors import ConfigError
from llmbuilder.finetune import FineTuner, FineTuningConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:no validation data", "ignore:no general_dataset", "ignore:the embedding trains", "ignore:style_adaptation",
    "ignore:data without tasks",
)  # fmt: skip
PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
CODE = "def add(a, b):\n    total = a + b\n    return [total, 'sum']\n\n"

# Each method's settings, as they are written in docs/methods.md.
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"use_lora": True, "lora_rank": 2},
    "full fine-tuning": {"use_lora": False},
    "freeze_layers": {"freeze_layers": 1},
    "domain": {"domain_weight": 0.5},
    "preserve_general_knowledge": {"preserve_general_knowledge": True, "domain_weight": 0.5},
    "style_adaptation": {"style_adaptation": True},
    "preserve_factual_knowledge": {"preserve_factual_knowledge": True},
    "progressive_unfreezing": {"progressive_unfreezing": True, "unfreeze_schedule": [(0, 1), (1, -1)]},
    "multi_task": {"multi_task": True, "task_weights": {"a": 0.5}},
    "task_specific_heads": {"multi_task": True, "task_specific_heads": True},
    "an adapter a task": {"multi_task": True, "shared_encoder": False},
    "ewc": {"continual_learning": True, "regularization_method": "ewc"},
    "l2": {"preserve_base_capabilities": True, "regularization_method": "l2"},
    "replay": {"continual_learning": True, "memory_buffer_size": 9, "replay_frequency": 0.3},
    "validation_on_base_tasks": {"validation_on_base_tasks": True},
    "special_tokens": {"special_tokens": ["<code>"]},
    "code_specific_loss": {"code_specific_loss": True},
    "syntax_aware_training": {"syntax_aware_training": True},
    "packing": {"data_collator": "packing"},
}
PAIRS = list(itertools.combinations(METHODS, 2))


def text(count: int, first: int = 0) -> TextDataset:
    return TextDataset([{"text": f"n = {n}\n{CODE}"} for n in range(first, first + count)], block_size=72)


def data(config: FineTuningConfig, count: int = 6, first: int = 0) -> Any:
    if not config.multi_task:
        return text(count, first)
    return MultiTaskDataset([("a", text(count // 2, first), 0.5), ("b", text(count // 2, first + 50), 0.5)])


def config_of(*settings: dict[str, Any], **more: Any) -> FineTuningConfig:
    """Of several methods; raises ConfigError where they contradict each other."""
    merged: dict[str, Any] = {}
    for each in settings:
        clash = [name for name in each if name in merged and merged[name] != each[name]]
        if clash:
            raise ConfigError(f"{clash[0]} cannot be both")
        merged |= each
    plain: dict[str, Any] = {"batch_size": 3, "max_seq_length": 96, "general_tokens": 150, "device": "cpu"}
    if "unfreeze_schedule" not in merged:
        plain |= {"num_epochs": 1}
    return FineTuningConfig(**plain | {"learning_rate": 1e-2, "scheduler": "constant"} | merged | more)


def trained(
    config: FineTuningConfig, make_gpt: Callable[..., Any], watch: list[Any], resume: bool = False
) -> FineTuner:
    """After an earlier task where the settings are about what comes after one; ``watch`` gets every batch's keys."""
    model = make_gpt(text=True, n_layer=2, block_size=96)
    earlier = None
    if config.continual_learning:
        first = FineTuningConfig(**config.resolved() | {"output_dir": None, "max_steps": 1})
        earlier = FineTuner(model, data(config, first=100), config=first)
        earlier.train()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    tuner = FineTuner(
        model, data(config), config=config, resume=resume, **({"continue_from": earlier} if earlier else {})
    )
    split = tuner.methods.split
    tuner.methods.split = lambda batch: watch.extend(batch.keys) or split(batch)  # type: ignore[method-assign]
    tuner.results = tuner.train()  # type: ignore[attr-defined]
    tuner.before = before  # type: ignore[attr-defined]
    return tuner


def check(name: str, tuner: Any, keys: list[Any]) -> None:
    """What shows that a method was at work."""
    end = {n.replace(".base.", "."): w for n, w in tuner.model.named_parameters()}
    same = {n for n, w in tuner.before.items() if n in end and len(w) == len(end[n]) and torch.equal(w, end[n])}
    sources = {source for source, _ in keys}
    history = tuner.results.history
    shown = {
        "LoRA": any("lora_A" in n for n in tuner.trained),
        "full fine-tuning": not any("lora_A" in n for n in end),
        "freeze_layers": not any("blocks.0." in n for n in tuner.trained),
        "domain": "general" in sources,
        "preserve_general_knowledge": "general" in sources and any(row.get("extra_loss") for row in history),
        "style_adaptation": not any(".mlp." in n for n in tuner.trained) and any("lora" in n for n in tuner.trained),
        "preserve_factual_knowledge": all(n in same for n in tuner.before if ".mlp." in n and "lora" not in n),
        "progressive_unfreezing": tuner.config.num_epochs == 2 and tuner.results.steps > 2,
        "multi_task": {tuner.run.sources["train"][0] is not None} == {True} and tuner.config.task_weights == {"a": 0.5},
        "task_specific_heads": any(".heads.1." in n for n in tuner.trained),
        "an adapter a task": {"a", "b"} <= {part for n in tuner.trained for part in n.split(".")},
        "ewc": "ewc" in tuner._past.methods,
        "l2": any("extra_loss" in row for row in history),
        "replay": "replay" in sources,
        "validation_on_base_tasks": tuner.results.forgetting is not None,
        "special_tokens": tuner.model.tokenizer.convert_tokens_to_ids("<code>") == 258,
        "code_specific_loss": "weights" in tuner.run.sources["train"][0],
        "syntax_aware_training": "<fim_middle>" in tuner.model.tokenizer.get_vocab(),
        "packing": tuner.config.data_collator == "packing",
    }
    assert shown[name], f"{name} left no trace"


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_pair_trains_and_each_does_its_part_or_is_refused(one: str, other: str, make_gpt: Any) -> None:
    refused = combination(one, other)
    try:
        config = config_of(METHODS[one], METHODS[other])
    except ConfigError as error:
        assert refused == "no", f"docs/methods.md says that {one} and {other} go together: {error}"
        return
    assert refused == "yes", f"docs/methods.md says that {one} and {other} do not go together"
    keys: list[Any] = []
    tuner = trained(config, make_gpt, keys)
    assert all(math.isfinite(row["loss"]) for row in tuner.results.history)  # type: ignore[attr-defined]
    for name in (one, other):
        check(name, tuner, keys)


def combination(one: str, other: str) -> str:
    """What the page's table says of two methods: yes or no."""
    rows = [line.split("|")[1:-1] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    table = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if len(row) == len(METHODS) + 1}
    names = list(METHODS)
    return table[one][names.index(other)] if one in table else "missing"


TOGETHER = {
    "lora, ewc, replay and several tasks": [METHODS[n] for n in ("LoRA", "ewc", "replay", "multi_task")],
    "domain, distillation, tokens, code and gaps": [
        METHODS[n]
        for n in ("LoRA", "preserve_general_knowledge", "special_tokens", "code_specific_loss", "syntax_aware_training")
    ],
    "unfreezing, heads, l2 and the base task": [
        METHODS[n] for n in ("progressive_unfreezing", "task_specific_heads", "l2", "validation_on_base_tasks")
    ],
    "an adapter a task, facts kept": [METHODS[n] for n in ("an adapter a task", "preserve_factual_knowledge")],
}


@pytest.mark.parametrize("name", TOGETHER)
def test_many_at_once_resume_bit_for_bit(name: str, make_gpt: Any, tmp_path: Path) -> None:
    """Killed in the middle of an epoch, the second task of two where there are two."""
    config = config_of(*TOGETHER[name], output_dir=tmp_path / "run", save_every=1, dropout_rate=None)
    whole = trained(config, make_gpt, [])
    steps = whole.results.steps  # type: ignore[attr-defined]
    assert steps >= 2
    kept = {
        file.name: file.read_bytes() for file in (tmp_path / "run").rglob("*.safetensors") if "step-" not in str(file)
    }
    for step in range(steps // 2 + 1, steps + 1):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step}")
    for left in ("results.json", "adapter", "adapters", "model", "heads", "past"):
        path = tmp_path / "run" / left
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    again = trained(config, make_gpt, [], resume=True)
    ends = [dict(tuner.model.named_parameters()) for tuner in (whole, again)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])
    wrote = {
        file.name: file.read_bytes() for file in (tmp_path / "run").rglob("*.safetensors") if "step-" not in str(file)
    }
    assert kept and wrote == kept
    assert [row["loss"] for row in whole.results.history] == [row["loss"] for row in again.results.history]  # type: ignore[attr-defined]


def test_a_second_run_goes_on_from_the_folder_of_one_with_heads_and_adapters(make_gpt: Any, tmp_path: Path) -> None:
    for number, settings in enumerate([{"task_specific_heads": True}, {"shared_encoder": False}]):
        folder = tmp_path / str(number)
        config = config_of({"multi_task": True}, settings, output_dir=folder)
        first = trained(config, make_gpt, [])
        second = FineTuningConfig(**config.resolved() | {"output_dir": None, "max_steps": 1, "learning_rate": 1e-30})
        model = make_gpt(text=True, n_layer=2, block_size=96)
        FineTuner(model, data(second, first=20), config=second, continue_from=folder).train()
        ends = [dict(each.named_parameters()) for each in (first.model, model)]
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.allclose(ends[0][n], ends[1][n], rtol=0, atol=1e-6) for n in ends[0])


def test_the_page_names_every_method() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert all(combination(name, name) == "" for name in METHODS)
    assert not re.search(r"guide|session|issue", text)
