"""Tiny models and data, and one way to train them."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmbuilder.finetune import FineTuner, FineTuningConfig
from llmbuilder.models import GPT, GPTConfig, byte_tokenizer

VOCABULARY = 31


@pytest.fixture(autouse=True)
def tiny_models(one_thread: None) -> None:
    """The models are so small that a second thread only waits."""


@pytest.fixture
def make_gpt() -> Callable[..., Any]:
    """A native GPT with random weights; equal arguments give equal weights. ``text=True``: with the byte tokenizer."""

    def make(seed: int = 0, text: bool = False, **shape: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            plain = {"vocab_size": 258 if text else VOCABULARY, "n_layer": 2, "n_head": 2, "n_embd": 16}
            model = GPT(GPTConfig(**plain | {"block_size": 32} | shape))
        if text:
            model.tokenizer = byte_tokenizer()
        return model

    return make


@pytest.fixture
def make_rows() -> Callable[..., list[dict[str, list[int]]]]:
    """Examples of uneven length, learnt whole, out of some of the tokens."""

    def make(count: int, seed: int = 0, low: int = 0, high: int = VOCABULARY) -> list[dict[str, list[int]]]:
        draw = random.Random(seed)
        rows = [[draw.randrange(low, high) for _ in range(draw.randint(6, 12))] for _ in range(count)]
        return [{"input_ids": row, "labels": list(row)} for row in rows]

    return make


@pytest.fixture
def tune() -> Callable[..., FineTuner]:
    """A tuner that has trained: full fine-tuning at a constant rate, nothing clipped, unless told otherwise; what it
    returned is its ``results``. Keywords of FineTuner go by their own names, all others are settings."""

    def train(model: nn.Module, rows: Any, val: Any = None, **settings: Any) -> FineTuner:
        own = ("general_dataset", "base_val_dataset", "continue_from", "resume", "overwrite")
        keywords = {name: settings.pop(name) for name in own if name in settings}
        plain: dict[str, Any] = {"learning_rate": 1e-2, "batch_size": 4, "scheduler": "constant", "num_epochs": 1}
        plain |= {"max_grad_norm": None, "device": "cpu"}
        if "learning_rate_schedule" in settings or "unfreeze_schedule" in settings:
            del plain["num_epochs"], plain["learning_rate"]
        tuner = FineTuner(model, rows, val, FineTuningConfig(**plain | settings), **keywords)
        tuner.results = tuner.train()  # type: ignore[attr-defined]
        return tuner

    return train


@pytest.fixture
def weights() -> Callable[[nn.Module], dict[str, Tensor]]:
    """Copies of a model's parameters by name."""
    return lambda model: {name: weight.detach().clone() for name, weight in model.named_parameters()}
