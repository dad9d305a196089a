"""Two tasks, one after the other in a process that can kill itself anywhere: LoRA, EWC, replay, multi-task at once.

The process does what its folder still lacks, so that started again it goes on where it was killed.
"""

import json
import os
import random
import signal
import warnings
from collections.abc import Callable
from itertools import count
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch

import llmbuilder as lb
from llmbuilder.cli import main
from llmbuilder.data import load_dataset
from llmbuilder.finetune import FineTuner, FineTuningConfig
from llmbuilder.models import GPT, GPTConfig, byte_tokenizer

STEPS = 5
"""Optimizer steps of each task; the first saves twice before its last."""

SETTINGS = {
    "use_lora": True,
    "lora_rank": 3,
    "lora_dropout": 0.2,
    "multi_task": True,
    "task_weights": {"letters": 2.0},
    "continual_learning": True,
    "regularization_method": "ewc",
    "regularization_strength": 3.0,
    "memory_buffer_size": 6,
    "replay_frequency": 0.3,
    "learning_rate": 0.01,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "save_every": 2,
    "eval_every": 3,
    "early_stopping_patience": 9,
    "max_seq_length": 24,
    "general_tokens": 64,
    "device": "cpu",
}
OF_TASKS: dict[str, Any] = {
    "task_specific_heads": True,
    "shared_encoder": False,
    "regularization_method": "l2",
    "memory_buffer_size": None,
    "replay_frequency": None,
}
"""Instead of EWC and replay: what each task has of its own."""


def prepare(home: Path) -> None:
    """A model, and the data of both tasks: a YAML file each, of letters and of digits."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=258, n_layer=1, n_head=2, n_embd=16, block_size=32, dropout=0.1))
    model.tokenizer = byte_tokenizer()
    lb.save_model(model, home / "model")
    draw = random.Random(0)
    for task in (1, 2, "val"):
        for name, alphabet in (("letters", "abcde"), ("digits", "12345")):
            rows = [{"text": "".join(draw.choices(alphabet, k=draw.randint(6, 20)))} for _ in range(9)]
            (home / f"{name}-{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        parts = [f"- {{name: {name}, data: {name}-{task}.jsonl, share: 0.5}}\n" for name in ("letters", "digits")]
        (home / f"{task}.yaml").write_text("".join(parts))


def by_command_line(home: Path, folder: Path, **settings: Any) -> None:
    """`llmbuilder finetune model` for the first task, then for the second."""
    given = FineTuningConfig(**SETTINGS | settings).to_yaml()
    folder.mkdir(exist_ok=True)
    (folder / "settings.yaml").write_text(given)
    words = ["finetune", "model", "--model", f"{home}/model", "--val-dataset", f"{home}/val.yaml"]
    words += ["--config", f"{folder}/settings.yaml", "--resume"]
    first, second = f"{folder}/first", f"{folder}/second"
    assert main([*words, "--dataset", f"{home}/1.yaml", "--output", first]) == 0
    assert main([*words, "--dataset", f"{home}/2.yaml", "--output", second, "--continue-from", first]) == 0


def by_python(home: Path, folder: Path, **settings: Any) -> None:
    """One FineTuner after the other on one model; the first task gets a name when it is over."""
    model = lb.load_model(home / "model")

    def tune(name: str, task: int, **how: Any) -> FineTuner:
        config = FineTuningConfig(**SETTINGS | settings, output_dir=folder / name)
        data, val = load_dataset(home / f"{task}.yaml", config), load_dataset(home / "val.yaml", config)
        tuner = FineTuner(model, data, val, config, resume=True, **how)
        tuner.train()
        return tuner

    first = tune("first", 1)
    first.end_task("before")
    tune("second", 2, continue_from=first)


Program = Callable[..., None]


def die_at(*places: tuple[str, str, int]) -> None:
    """Kill this process at a place: where its owner's function is called for the n-th time. Of several places each
    counts from where the one before it was reached."""
    (owner, name, number), *inner = places
    where = resolve_name(owner)
    call, calls = getattr(where, name), count(1)

    def deadly(*args: Any, **more: Any) -> Any:
        if next(calls) == number:
            if not inner:
                os.kill(os.getpid(), signal.SIGKILL)
            die_at(*inner)
        return call(*args, **more)

    setattr(where, name, deadly)


def run(program: Program, home: Path, folder: Path, *places: tuple[str, str, int], **settings: Any) -> None:
    """Both tasks by one of the programs, as far as the place to die at."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if places:
            die_at(*places)
        program(home, folder, **settings)
