"""Tiny models of every family, with weights and adapters far from zero."""

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

from llmbuilder.models import GPT, GPTConfig
from llmbuilder.nn import add_lora

VOCAB = 61
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2_SHAPE = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
NEOX_SHAPE = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**SHAPE),
    "gemma": lambda: transformers.GemmaConfig(**SHAPE, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**SHAPE, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SHAPE, head_dim=8),
    "gpt2": lambda: transformers.GPT2Config(
        **GPT2_SHAPE, bos_token_id=None, eos_token_id=None, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**NEOX_SHAPE),
    "phi": lambda: transformers.PhiConfig(**SHAPE),
    "phi3": lambda: transformers.Phi3Config(**SHAPE),
}


def tiny_model(name: str) -> nn.Module:
    """A tiny model of a family; the same name gives the same weights, large enough for logits to differ clearly."""
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        if name == "native":
            shape = GPTConfig(vocab_size=VOCAB, n_layer=2, n_head=4, n_embd=32, block_size=64)
            model: nn.Module = GPT(shape)
        else:
            model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def shuffled(model: nn.Module) -> nn.Module:
    """Random A and B in place of those that an adapter starts with; biases and whole modules that train move too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                like = torch.randn_like(parameter)
                parameter.copy_(0.2 * like if "lora_" in name else parameter + 0.2 * like)
    return model


@pytest.fixture(params=[*CONFIGS, "native"])
def family(request: pytest.FixtureRequest) -> str:
    """Each family's name in turn."""
    return str(request.param)


@pytest.fixture
def make() -> Callable[[str], nn.Module]:
    """Builds the tiny model of the family that is named."""
    return tiny_model


@pytest.fixture
def adapted() -> Callable[..., nn.Module]:
    """Builds a family's tiny model with an adapter of random A and B."""

    def build(family: str, config: object = None, **more: object) -> nn.Module:
        model = tiny_model(family)
        add_lora(model, config, **more)  # type: ignore[arg-type]
        return shuffled(model)

    return build


@pytest.fixture
def shuffle() -> Callable[[nn.Module], nn.Module]:
    return shuffled


@pytest.fixture
def ids() -> Tensor:
    """A fresh batch of token ids."""
    return torch.randint(VOCAB, (2, 9))


@pytest.fixture
def logits(ids: Tensor) -> Callable[[nn.Module], Tensor]:
    """The model's logits for that batch, without gradients; `.noise` is their distance to its fp64 copy's."""

    def compute(model: nn.Module) -> Tensor:
        with torch.no_grad():
            result: Tensor = model(ids).logits
            exact = copy.deepcopy(model).double()(ids).logits
        result.noise = float((result - exact).abs().max())  # type: ignore[attr-defined]
        return result

    return compute


@pytest.fixture
def assert_close() -> Callable[[Tensor, Tensor], None]:
    """Equal to rounding: apart by no more than the rounding noise of the two models together (how much a model makes of
    a rounding error differs from draw to draw), and 32 units in the last place of the largest value."""

    def check(actual: Tensor, expected: Tensor) -> None:
        bound = 32 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
        noise = sum(getattr(side, "noise", 0.0) for side in (actual, expected))
        assert float((actual - expected).abs().max()) <= bound + noise

    return check
