"""A tiny model and tiny data, the same for each seed."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from llmbuilder.finetune import FineTuningConfig
from llmbuilder.models import GPT, GPTConfig

VOCABULARY = 61
CONTEXT = 32


@pytest.fixture(autouse=True)
def tiny_models(one_thread: None) -> None:
    """The models are so small that a second thread only waits."""


@pytest.fixture
def make_gpt() -> Callable[..., nn.Module]:
    """A native GPT with random weights; equal arguments give equal weights."""

    def make(seed: int = 0, n_layer: int = 2, **settings: Any) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            settings = {"vocab_size": VOCABULARY, "n_head": 2, "n_embd": 32, "block_size": CONTEXT} | settings
            return GPT(GPTConfig(n_layer=n_layer, **settings))

    return make


@pytest.fixture
def make_examples() -> Callable[..., list[dict[str, list[int]]]]:
    """Examples of uneven length, some positions without a target."""

    def make(count: int, seed: int = 0, shortest: int = 6, longest: int = 20) -> list[dict[str, list[int]]]:
        draw = random.Random(seed)
        examples = []
        for _ in range(count):
            ids = [draw.randrange(VOCABULARY) for _ in range(draw.randint(shortest, longest))]
            masked = draw.randint(0, len(ids) // 2)
            examples.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
        return examples

    return make


@pytest.fixture
def make_config() -> Callable[..., FineTuningConfig]:
    """Full fine-tuning with a constant rate, nothing clipped, unless told otherwise."""

    def make(**settings: Any) -> FineTuningConfig:
        plain = {
            "use_lora": False,
            "learning_rate": 1e-3,
            "batch_size": 4,
            "scheduler": "constant",
            "max_grad_norm": None,
            "dtype": "fp32",
            "device": "cpu",
            "num_epochs": 2,
        }
        return FineTuningConfig(**plain | settings)

    return make
