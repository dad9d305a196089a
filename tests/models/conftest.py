"""Tiny models of each family, made from their transformers configs with random weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from llmbuilder.models import GPT, GPTConfig, byte_tokenizer

VOCAB = 264  # the byte-level tokenizer's 258, and some that it doesn't use
LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA_LIKE, **NO_IDS),
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA_LIKE, **NO_IDS, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**LLAMA_LIKE, **NO_IDS, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**LLAMA_LIKE, **NO_IDS, sliding_window=8),
    "gemma": lambda: transformers.GemmaConfig(**LLAMA_LIKE, **NO_IDS, head_dim=8),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, **NO_IDS),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        **NO_IDS,
    ),
    "phi": lambda: transformers.PhiConfig(**{**LLAMA_LIKE, "num_key_value_heads": 4}, **NO_IDS),
}


@pytest.fixture(params=list(CONFIGS))
def family(request: pytest.FixtureRequest) -> nn.Module:
    """A tiny model of each family in turn, in evaluation mode."""
    return hugging_face_model(request.param)


@pytest.fixture
def make_family() -> Callable[[str], nn.Module]:
    """Builds the tiny model of the family that is named."""
    return hugging_face_model


def hugging_face_model(name: str) -> nn.Module:
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    for parameter in model.parameters():  # as far from a fresh start, whose logits are nearly equal, as weights get
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture
def hugging_face_folder(tmp_path: Path) -> Callable[[nn.Module], Path]:
    """Saves a transformers model with the byte-level tokenizer, as transformers itself does it."""

    def save(model: nn.Module) -> Path:
        folder = tmp_path / "hugging_face"
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def gpt() -> GPT:
    """A tiny native model in evaluation mode, with weights large enough for its answers to differ."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=VOCAB, n_layer=2, n_head=4, n_embd=32, block_size=64))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()
