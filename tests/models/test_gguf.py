"""GGUF files load unpacked: their weights are those of the gguf library's own arithmetic."""

import os
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from torch import Tensor, nn

from llmbuilder.errors import LLMBuilderError
from llmbuilder.models import byte_tokenizer, load_model, save_model
from llmbuilder.models import gguf as gguf_module

CONFIG = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
IDS = torch.tensor([[5, 70, 200, 7, 7, 33, 104, 2, 90, 61, 18]])


def gguf_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in GGUF's order: the two numbers that rotary positions turn together lie side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, model: nn.Module, kind: Kind) -> dict[str, Tensor]:
    """Write a Llama as GGUF with its matrices stored as ``kind``; returns the weights as they were stored."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(264)
    tokens = [token for token, _ in sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, "th", "in", "<a>", "<b>", "<c>", "<d>"])
    writer.add_token_types([1] * 256 + [3, 3, 1, 1, 3, 3, 3, 3])
    writer.add_token_merges(["t h", "i n"])
    writer.add_eos_token_id(256)
    stored = {}
    for name, tensor in model.state_dict().items():
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else None
        array = interleaved(tensor.numpy(), heads) if heads else tensor.numpy()
        as_kind = kind if tensor.dim() == 2 else Kind.F32
        data = gguf.quants.quantize(array, as_kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=as_kind)
        values = torch.from_numpy(gguf.quants.dequantize(data, as_kind).copy())
        if heads:  # and back to transformers' order
            values = values.view(heads, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
        stored[name] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.fixture
def llama() -> nn.Module:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG, tie_word_embeddings=False)).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture
def bf16_hardware(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    return lambda there: monkeypatch.setattr(gguf_module, "computes_bf16", lambda device: there)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1])
def test_weights_are_those_that_the_gguf_library_unpacks(tmp_path: Path, llama: nn.Module, kind: Kind) -> None:
    stored = write(tmp_path / "tiny.gguf", llama, kind)
    model = load_model(tmp_path / "tiny.gguf", dtype="fp32")
    assert set(model.state_dict()) == set(stored)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, stored[name]), name
    llama.load_state_dict(stored)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, llama(IDS).logits)


@pytest.mark.parametrize(
    ("kind", "hardware", "dtype"),
    [
        (Kind.F32, True, torch.float32),
        (Kind.F16, True, torch.float16),
        (Kind.BF16, False, torch.bfloat16),
        (Kind.Q4_1, True, torch.bfloat16),
        (Kind.Q4_1, False, torch.float32),
    ],
)
def test_auto_is_the_stored_dtype_or_what_the_device_computes(
    tmp_path: Path,
    llama: nn.Module,
    bf16_hardware: Callable[[bool], None],
    kind: Kind,
    hardware: bool,
    dtype: torch.dtype,
) -> None:
    bf16_hardware(hardware)
    stored = write(tmp_path / "tiny.gguf", llama, kind)
    model = load_model(tmp_path)  # the folder
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, stored[name].to(dtype)) and weight.dtype == dtype, name


def test_an_unpacked_model_trains_and_saves_like_any_other(tmp_path: Path, llama: nn.Module) -> None:
    write(tmp_path / "tiny.gguf", llama, Kind.Q8_0)
    model = load_model(tmp_path / "tiny.gguf", dtype="fp32")
    assert not model.is_quantized and model.hf_quantizer is None
    assert not hasattr(model.config, "quantization_config")
    layers = [module for name, module in model.named_modules() if name.endswith("_proj")]
    assert len(layers) == 14 and all(type(layer) is nn.Linear for layer in layers)
    transformers.Trainer(model, transformers.TrainingArguments(str(tmp_path / "run")))  # refuses quantised models
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    text = "the thin thing"
    assert again.tokenizer(text).input_ids == model.tokenizer(text).input_ids


def test_its_tokenizer_comes_along(tmp_path: Path, llama: nn.Module) -> None:
    write(tmp_path / "tiny.gguf", llama, Kind.F32)
    tokenizer = load_model(tmp_path / "tiny.gguf").tokenizer
    ids = tokenizer("thé", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == "thé"
    assert ids == [258, 195, 169], "the merged pair, and the two bytes of é"
    assert tokenizer.eos_token_id == 256 and tokenizer.pad_token is not None


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_one_clear_error(tmp_path: Path, llama: nn.Module, share: float) -> None:
    path = tmp_path / "tiny.gguf"
    write(path, llama, Kind.Q8_0)
    os.truncate(path, int(path.stat().st_size * share))
    for dtype in ("auto", "fp32"):
        with pytest.raises(LLMBuilderError, match=str(path)):
            load_model(path, dtype=dtype)


def test_a_file_without_one_of_its_weights_is_refused(tmp_path: Path, llama: nn.Module) -> None:
    class Without(nn.Module):
        config = llama.config

        def state_dict(self) -> dict[str, Tensor]:
            return {name: tensor for name, tensor in llama.state_dict().items() if "layers.1.mlp.up" not in name}

    write(tmp_path / "tiny.gguf", Without(), Kind.F32)
    with pytest.raises(LLMBuilderError, match=r"1 missing weights, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tmp_path / "tiny.gguf")
