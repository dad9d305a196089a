"""A small training run that a test can start in a process of its own, and that can kill itself at a disk operation."""

import itertools
import multiprocessing
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmbuilder.finetune import FineTuner, FineTuningConfig, Results, tuner
from llmbuilder.finetune.checkpoint import save_checkpoint
from llmbuilder.models import GPT, GPTConfig

VOCABULARY = 61


def make_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT(GPTConfig(vocab_size=VOCABULARY, n_layer=2, n_head=2, n_embd=32, block_size=32, dropout=0.1))


def make_data(count: int, seed: int) -> list[dict[str, list[int]]]:
    draw = random.Random(seed)
    rows = [[draw.randrange(VOCABULARY) for _ in range(draw.randint(6, 20))] for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def make_config(folder: Path, **settings: Any) -> FineTuningConfig:
    """12 optimizer steps in two epochs, each with a short window at its end; dropout, evaluations, best weights."""
    plain = {
        "use_lora": False,
        "dropout_rate": 0.2,
        "learning_rate": 3e-3,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_epochs": 2,
        "eval_every": 3,
        "early_stopping_patience": 3,
        "warmup_steps": 3,
        "save_every": 2,
        "output_dir": folder,
        "device": "cpu",
    }
    return FineTuningConfig(**plain | settings)


def train(folder: Path, resume: bool = False, **settings: Any) -> Results:
    """Run, or go on, to the end."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = make_config(folder, **settings)
        return FineTuner(make_model(), make_data(22, 1), make_data(5, 2), config, resume=resume).train()


def train_until_call(folder: Path, die_at: int, **settings: Any) -> None:
    """Go on from whatever is there; killed at the ``die_at``-th function call, Python's or C's: anywhere at all."""
    count = itertools.count(1)

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event.endswith("call") and next(count) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)
    train(folder, resume=True, **settings)


def count_calls(folder: Path, counted: Any, **settings: Any) -> None:
    """How many calls a run makes that nothing disturbs."""
    calls = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event.endswith("call")

    sys.setprofile(profile)
    train(folder, resume=True, **settings)
    sys.setprofile(None)
    counted.value = calls


def train_until_saving(folder: Path, die_at: int, **settings: Any) -> None:
    """Go on from whatever is there; killed right before or after the ``die_at``-th sync or rename of a checkpoint."""
    count = itertools.count(1)
    saving = False

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            number = next(count) if saving else 0
            if number == die_at and number % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **more)
            if number == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    def save(*args: Any) -> Path:
        nonlocal saving
        saving = True
        path = save_checkpoint(*args)
        saving = False
        return path

    os.fsync = deadly(os.fsync)
    Path.rename = deadly(Path.rename)  # type: ignore[method-assign]
    Path.replace = deadly(Path.replace)  # type: ignore[method-assign]
    tuner.save_checkpoint = save
    train(folder, resume=True, **settings)


class Processes:
    """Starts runs in processes forked from one that has loaded the libraries."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        libraries = [
            "llmbuilder.finetune.tuner",
            "torch.utils.tensorboard",
            "torch._dynamo",
            "matplotlib.backends.backend_agg",
        ]
        self.context.set_forkserver_preload(libraries)

    def run(self, target: Callable[..., Any], *args: Any, **settings: Any) -> int:
        process = self.context.Process(target=target, args=args, kwargs=settings)
        process.start()
        process.join(300)
        process.kill()
        process.join()
        assert process.exitcode is not None
        return process.exitcode
