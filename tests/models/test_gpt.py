"""The native model computes its formula, which is Llama's, whatever way its arguments come."""

import math

import pytest
import torch
import transformers
from torch import Tensor, nn

from llmbuilder.errors import ConfigError, LLMBuilderError
from llmbuilder.models import GPT, GPTConfig

SMALL = {"vocab_size": 40, "n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 64}


def formula(model: GPT, ids: list[int]) -> Tensor:
    """Logits [T, vocab] in fp64, position by position and head by head, straight from the papers."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    size = model.config.n_embd // model.config.n_head

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]

    def turn(x: Tensor) -> Tensor:
        y = x.clone()
        for position in range(len(x)):
            for i in range(size // 2):
                angle = position * 10_000 ** (-2 * i / size)
                a, b = x[position, i], x[position, i + size // 2]
                y[position, i] = a * math.cos(angle) - b * math.sin(angle)
                y[position, i + size // 2] = b * math.cos(angle) + a * math.sin(angle)
        return y

    x = weights["embedding.weight"][ids]
    for layer in range(model.config.n_layer):
        name = f"blocks.{layer}"
        h = norm(x, f"{name}.attention_norm")
        q, k, v = (h @ weights[f"{name}.attention.{part}.weight"].T for part in ("query", "key", "value"))
        heads = []
        for part in range(0, model.config.n_embd, size):
            scores = turn(q[:, part : part + size]) @ turn(k[:, part : part + size]).T / math.sqrt(size)
            scores += torch.full_like(scores, -math.inf).triu(1)
            heads.append(scores.softmax(-1) @ v[:, part : part + size])
        x = x + torch.cat(heads, -1) @ weights[f"{name}.attention.output.weight"].T
        h = norm(x, f"{name}.mlp_norm")
        gate, up = (h @ weights[f"{name}.mlp.{part}.weight"].T for part in ("gate", "up"))
        x = x + (gate / (1 + (-gate).exp()) * up) @ weights[f"{name}.mlp.down.weight"].T
    return norm(x, "norm") @ weights["head.weight"].T


def as_llama(model: GPT) -> nn.Module:
    """transformers' Llama with the same weights."""
    config = model.config
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embd,
            intermediate_size=config.n_hidden,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            max_position_embeddings=config.block_size,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        )
    )
    names = {
        "embedding.": "model.embed_tokens.",
        "blocks.": "model.layers.",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
        "head.": "lm_head.",
    }
    weights = {}
    for name, tensor in model.state_dict().items():
        new = "model." + name if name == "norm.weight" else name
        for ours, theirs in names.items():
            new = new.replace(ours, theirs)
        weights[new] = tensor
    llama.load_state_dict(weights)
    return llama.eval()


def assert_close(out: Tensor, same: Tensor, exact: Tensor) -> None:
    """At most twice the error of the other implementation in that dtype, and one ulp."""
    out, same = out.double(), same.double()
    bound = 2 * (same - exact).abs().max() + exact.abs().max() * torch.finfo(torch.float32).eps
    assert (out - exact).abs().max() <= bound


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_formula_and_of_llama(tied: bool) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, tie_word_embeddings=tied)).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    ids = torch.randint(40, (1, 21))
    with torch.no_grad():
        assert_close(model(ids).logits[0], as_llama(model)(ids).logits[0], formula(model, ids[0].tolist()))


def test_loss_and_gradients_are_those_of_llama(gpt: GPT) -> None:
    llama = as_llama(gpt)
    ids = torch.randint(264, (3, 17))
    labels = ids.masked_fill(torch.rand(3, 17) < 0.3, -100)
    ours, theirs = gpt(ids, labels=labels).loss, llama(ids, labels=labels).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    ours.backward()
    theirs.backward()
    for mine, other in (
        (gpt.embedding.weight, llama.model.embed_tokens.weight.grad + llama.lm_head.weight.grad),  # there untied
        (gpt.blocks[0].attention.query.weight, llama.model.layers[0].self_attn.q_proj.weight.grad),
        (gpt.blocks[1].mlp.down.weight, llama.model.layers[1].mlp.down_proj.weight.grad),
        (gpt.norm.weight, llama.model.norm.weight.grad),
    ):
        assert (mine.grad - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_seen_by_nobody(gpt: GPT, side: str) -> None:
    ids, alone = torch.randint(264, (1, 9)), slice(4, None) if side == "left" else slice(None, 9)
    padded = torch.full((2, 13), 7)
    padded[0, alone] = ids
    padded[1] = torch.randint(264, (13,))
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0] = 0
    mask[0, alone] = 1
    with torch.no_grad():
        logits = gpt(padded, mask).logits
        torch.testing.assert_close(logits[0, alone], gpt(ids).logits[0], rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(logits[1], gpt(padded[1:]).logits[0], rtol=1e-5, atol=2e-5)
        assert logits.isfinite().all()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_rows_of_padding_leave_gradients_finite(dropout: float) -> None:
    model = GPT(GPTConfig(**SMALL, dropout=dropout)).train()
    ids, mask = torch.randint(40, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3], mask[1] = 0, 0
    model(ids, mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in model.parameters())


def test_packed_sequences_are_computed_apart(gpt: GPT) -> None:
    first, second = torch.randint(264, (1, 6)), torch.randint(264, (1, 5))
    packed = torch.cat([first, second, torch.tensor([[3]])], dim=1)  # and one position of padding
    mask = torch.zeros(1, 1, 12, 12, dtype=torch.bool)
    mask[..., :6, :6] = torch.ones(6, 6).tril().bool()
    mask[..., 6:11, 6:11] = torch.ones(5, 5).tril().bool()
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0]])
    with torch.no_grad():
        logits = gpt(packed, mask, positions).logits
        torch.testing.assert_close(logits[:, :6], gpt(first).logits, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(logits[:, 6:11], gpt(second).logits, rtol=1e-5, atol=2e-5)
        assert logits.isfinite().all()


@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 6], [12]])
def test_cached_steps_give_the_logits_of_one_pass(gpt: GPT, chunks: list[int]) -> None:
    ids = torch.randint(264, (2, 12))
    with torch.no_grad():
        whole, cache, parts = gpt(ids).logits, None, []
        for chunk in ids.split(chunks, dim=1):
            output = gpt(chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=2e-5)


def test_logits_to_keep_are_the_last_ones(gpt: GPT) -> None:
    ids = torch.randint(264, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(gpt(ids, logits_to_keep=3).logits, gpt(ids).logits[:, -3:], rtol=1e-5, atol=1e-5)


def test_checkpointing_recomputes_the_same_gradients_with_dropout() -> None:
    torch.manual_seed(2)
    model = GPT(GPTConfig(**SMALL, dropout=0.2)).train()
    ids = torch.randint(40, (2, 16))
    calls = []
    model.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))

    def gradients() -> list[Tensor]:
        torch.manual_seed(3)
        calls.clear()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    assert len(calls) == 1
    model.gradient_checkpointing_enable()
    again = gradients()
    assert len(calls) == 2, "the block was not computed a second time"
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    model.gradient_checkpointing_disable()
    gradients()
    assert len(calls) == 1


def test_each_dropout_acts_in_training_only() -> None:
    torch.manual_seed(4)
    model = GPT(GPTConfig(**SMALL, dropout=0.0))
    ids = torch.randint(40, (2, 16))
    drops = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert len(drops) == 1 + 2 * SMALL["n_layer"], "one after the embedding, two in each block"
    with torch.no_grad():
        still = model.eval()(ids).logits
        assert torch.equal(model.train()(ids).logits, still)
        for drop in drops:
            drop.p = 0.5
            assert not torch.allclose(model.train()(ids).logits, still)
            assert torch.equal(model.eval()(ids).logits, still)
            drop.p = 0.0


def test_the_config_sets_every_dropout() -> None:
    model = GPT(GPTConfig(**SMALL, dropout=0.25))
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.25] * 5


def test_initial_weights_have_the_documented_spread() -> None:
    torch.manual_seed(5)
    model = GPT(GPTConfig(vocab_size=500, n_layer=8, n_head=4, n_embd=128, block_size=64, tie_word_embeddings=False))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            expected = 0.02 / 4 if name.endswith(("attention.output.weight", "mlp.down.weight")) else 0.02
            assert abs(parameter.std().item() / expected - 1) < 0.05, name
            assert abs(parameter.mean().item()) < 5 * expected / parameter.numel() ** 0.5, name
        else:
            assert torch.equal(parameter, torch.ones_like(parameter)), name


def test_the_head_is_the_embedding_unless_untied() -> None:
    assert (tied := GPT(GPTConfig(**SMALL))).head.weight is tied.embedding.weight
    untied = GPT(GPTConfig(**SMALL, tie_word_embeddings=False))
    assert untied.head.weight is not untied.embedding.weight
    assert untied.get_input_embeddings() is untied.embedding and untied.get_output_embeddings() is untied.head


def test_a_sequence_beyond_the_block_size_is_refused(gpt: GPT) -> None:
    with pytest.raises(LLMBuilderError, match="65 tokens is longer than the model's block_size of 64"):
        gpt(torch.zeros(1, 65, dtype=torch.long))
    cache = gpt(torch.zeros(1, 60, dtype=torch.long), use_cache=True).past_key_values
    with pytest.raises(LLMBuilderError, match="65 tokens"):
        gpt(torch.zeros(1, 5, dtype=torch.long), past_key_values=cache)


@pytest.mark.parametrize("mask", [torch.ones(1, 5), torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 5).bool()])
def test_a_mask_of_another_shape_or_dtype_is_refused(gpt: GPT, mask: Tensor) -> None:
    with pytest.raises(LLMBuilderError, match="attention_mask must be"):
        gpt(torch.zeros(1, 4, dtype=torch.long), mask)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_layer": 0}, "n_layer must be at least 1, got 0"),
        ({"n_head": 3}, "even multiple of n_head"),
        ({"n_embd": 4}, "even multiple of n_head"),
        ({"dropout": 1.0}, "dropout must lie in"),
    ],
)
def test_an_impossible_shape_is_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPTConfig(**{**SMALL, **wrong})


def test_autocast_computes_in_bf16(gpt: GPT) -> None:
    ids = torch.randint(264, (2, 12))
    with torch.no_grad():
        exact = torch.stack([formula(gpt, row.tolist()) for row in ids])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = gpt(ids).logits
            same = as_llama(gpt)(ids).logits
    assert logits.dtype == torch.bfloat16
    bound = 2 * (same.double() - exact).abs().max() + exact.abs().max() * torch.finfo(torch.bfloat16).eps
    assert (logits.double() - exact).abs().max() <= bound
