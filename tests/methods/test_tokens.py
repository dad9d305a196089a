"""New special tokens: in the tokenizer and the embeddings, saved with the adapter or the model."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from llmbuilder.data import TextDataset
from llmbuilder.errors import ConfigError, LLMBuilderError
from llmbuilder.finetune import FineTuner, FineTuningConfig
from llmbuilder.models import byte_tokenizer, load_model
from llmbuilder.nn import load_adapter

pytestmark = pytest.mark.filterwarnings("ignore:no validation data")
TOKENS = ["<code>", "</code>"]
TEXT = "<code>a + b</code> and <code>c</code> again "


@pytest.fixture
def text(tmp_path: Path) -> Any:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 8)
    return lambda: TextDataset(path, block_size=24)


def tables(model: Any) -> dict[str, torch.Tensor]:
    found = {"embedding": model.get_input_embeddings().weight, "head": model.get_output_embeddings().weight}
    return {name: table.detach().clone() for name, table in found.items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("use_lora", [True, False])
def test_special_tokens_are_one_id_each_and_start_at_the_mean(
    make_gpt: Any, tune: Any, text: Any, tied: bool, use_lora: bool
) -> None:
    model = make_gpt(text=True, tie_word_embeddings=tied)
    before = tables(model)
    tuner = tune(model, text(), special_tokens=TOKENS, use_lora=use_lora, learning_rate=1e-30, weight_decay=0.0)
    assert model.tokenizer(TEXT)["input_ids"].count(258) == 2 == model.tokenizer(TEXT)["input_ids"].count(259)
    assert model.tokenizer.convert_tokens_to_ids(TOKENS) == [258, 259]
    ids = [
        token for i in range(len(tuner.run.sources["train"])) for token in tuner.run.sources["train"][i]["input_ids"]
    ]
    assert ids.count(258) == 16 == ids.count(259)
    for name, table in tables(model).items():
        assert table.shape == (260, 16) and torch.equal(table[:258], before[name])
        torch.testing.assert_close(table[258:], before[name].mean(0).expand(2, 16))


@pytest.mark.parametrize("use_lora", [True, False])
def test_with_rows_to_spare_new_tokens_start_at_the_mean_too(
    make_gpt: Any, tune: Any, text: Any, use_lora: bool
) -> None:
    """Of the tokens that the tokenizer had: what stands in the spare rows, nobody has trained."""
    model = make_gpt(text=True, vocab_size=300, tie_word_embeddings=False)
    model.head.bias = nn.Parameter(torch.randn(300))
    with torch.no_grad():
        model.embedding.weight[258:] = 1000.0
    before, bias = tables(model), model.head.bias.detach().clone()
    tune(model, text(), special_tokens=TOKENS, use_lora=use_lora, learning_rate=1e-30, weight_decay=0.0)
    old = [*range(258), *range(260, 300)]
    for name, table in {**tables(model), "bias": model.get_output_embeddings().bias[:, None]}.items():
        given = before.get(name, bias[:, None])
        assert torch.equal(table[old], given[old])
        torch.testing.assert_close(table[258:260], given[:258].mean(0).expand(2, -1))


@pytest.mark.parametrize("tied", [True, False])
def test_under_lora_only_the_new_rows_train_and_reload_with_the_adapter(
    make_gpt: Any, tune: Any, text: Any, tmp_path: Path, tied: bool
) -> None:
    """Old rows keep their bits under weight decay; a fresh base gets tokenizer, rows and logits from the folder."""
    model = make_gpt(text=True, tie_word_embeddings=tied)
    before = tables(model)
    settings = {"special_tokens": TOKENS, "lora_rank": 2, "num_epochs": 3, "weight_decay": 0.3}
    tune(model, text(), **settings, output_dir=tmp_path / "run")
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    rows = {name: weight for name, weight in trained.items() if "lora_" not in name}
    assert [tuple(weight.shape) for weight in rows.values()] == [(2, 16)] * (1 if tied else 2)
    for name, table in tables(model).items():
        assert torch.equal(table[:258], before[name])
        mean = before[name].mean(0).expand(2, 16)
        assert all((weight - mean).abs().max() > 1e-3 for weight in rows.values() if weight.shape == mean.shape)

    fresh = make_gpt(text=True, tie_word_embeddings=tied)
    load_adapter(fresh, tmp_path / "run" / "adapter")
    ids = torch.tensor(fresh.tokenizer([TEXT])["input_ids"])[:, :32]
    assert 258 in ids and fresh.tokenizer.decode(ids[0]) == TEXT[: len(fresh.tokenizer.decode(ids[0]))]
    assert torch.equal(model(ids).logits, fresh.eval()(ids).logits)
    assert model(ids).logits.shape[-1] == 260


def test_what_the_rows_compute_is_what_a_table_with_these_rows_computes(make_gpt: Any, tune: Any, text: Any) -> None:
    model = make_gpt(text=True)
    tune(model, text(), special_tokens=TOKENS, lora_rank=2, num_epochs=2)
    ids = torch.tensor([[258, 5, 259, 257, 0]])
    adapted = model(ids).logits
    rows = next(weight for name, weight in model.named_parameters() if name.endswith(".rows"))
    plain = make_gpt(text=True)
    plain.resize_token_embeddings(260)
    with torch.no_grad():
        plain.embedding.weight[258:] = rows
    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Linear) and ".attention." in name:
            adapter = model.get_submodule(name)
            with torch.no_grad():
                layer.weight += adapter.delta()
    torch.testing.assert_close(adapted, plain(ids).logits, rtol=1e-4, atol=1e-5)


def test_full_fine_tuning_saves_the_longer_model(make_gpt: Any, tune: Any, text: Any, tmp_path: Path) -> None:
    model = make_gpt(text=True)
    tune(model, text(), special_tokens=TOKENS, output_dir=tmp_path / "run")
    again: Any = load_model(tmp_path / "run" / "model")
    assert again.config.vocab_size == 260 and again.tokenizer.convert_tokens_to_ids("</code>") == 259
    ids = torch.tensor([[258, 5, 259]])
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_tokens_that_are_there_stay_as_they_are(make_gpt: Any, tune: Any, text: Any) -> None:
    model = make_gpt(text=True)
    tune(model, text(), special_tokens=["<|pad|>", "<new>"], lora_rank=2)
    assert len(model.tokenizer) == 259 and model.tokenizer.convert_tokens_to_ids("<|pad|>") == 257
    spare = make_gpt(text=True, vocab_size=300)
    spare.tokenizer = byte_tokenizer()
    tune(spare, text(), special_tokens=["<new>"], lora_rank=2)
    assert tables(spare)["embedding"].shape[0] == 300, "a vocabulary with room to spare stays as it is"


def test_a_resumed_run_repeats_an_uninterrupted_one(
    make_gpt: Any, tune: Any, text: Any, weights: Any, tmp_path: Path
) -> None:
    settings = {"special_tokens": TOKENS, "lora_rank": 2, "num_epochs": 2, "save_every": 2}
    whole = tune(make_gpt(text=True), text(), **settings, output_dir=tmp_path / "run")
    last = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))
    shutil.rmtree(last)
    (tmp_path / "run" / "results.json").unlink()
    again = tune(make_gpt(text=True), text(), **settings, output_dir=tmp_path / "run", resume=True)
    assert all(torch.equal(weights(whole.model)[name], value) for name, value in weights(again.model).items())
    stored = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert stored["trainable_token_indices"] == [258, 259]


def test_new_tokens_for_an_adapter_that_is_there_are_refused_before_anything_changes(
    make_gpt: Any, tune: Any, text: Any
) -> None:
    first = tune(make_gpt(text=True), text(), use_lora=True)
    size = len(first.model.tokenizer)
    with pytest.raises(ConfigError, match="no rows for the new tokens <a>"):
        tune(first.model, text(), use_lora=True, special_tokens=["<a>"], continue_from=first)
    assert len(first.model.tokenizer) == size


@pytest.mark.parametrize("through", ["folder", "process"])
def test_the_next_task_of_a_full_run_keeps_the_tokens_and_may_add_more(
    make_gpt: Any, tune: Any, text: Any, tmp_path: Path, through: str
) -> None:
    """With EWC, which knows nothing of the rows that are new."""
    settings = {"use_lora": False, "continual_learning": True, "regularization_strength": 1.0, "max_steps": 2}
    first = tune(make_gpt(text=True), text(), **settings, special_tokens=["<a>"], output_dir=tmp_path / "a")
    row = first.model.get_input_embeddings().weight[258].clone()
    model, source = (make_gpt(text=True), tmp_path / "a") if through == "folder" else (first.model, first)
    second = FineTuner(model, text(), config=FineTuningConfig(**settings, special_tokens=["<b>"]), continue_from=source)
    assert second.model.tokenizer.convert_tokens_to_ids(["<a>", "<b>"]) == [258, 259]
    assert torch.equal(second.model.get_input_embeddings().weight[258], row)
    assert second.train().history[-1]["extra_loss"] > 0


def test_a_model_without_a_tokenizer_gets_no_tokens(make_gpt: Any, make_rows: Any, tune: Any) -> None:
    with pytest.raises(LLMBuilderError, match="the model has none"):
        tune(make_gpt(), make_rows(4), special_tokens=TOKENS)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"special_tokens": []}, "each once, none of them empty"),
        ({"special_tokens": ["<a>", "<a>"]}, "each once"),
        ({"special_tokens": ["<a>", ""]}, "none of them empty"),
        ({"special_tokens": ["<a>"], "freeze_embeddings": True}, "freeze_embeddings keeps them from learning"),
        (
            {"lora_config": {"trainable_token_indices": [3]}, "freeze_embeddings": True},
            "rows of the embeddings, and freeze",
        ),
        ({"special_tokens": ["<a>"], "target_modules": ["attention", "embeddings"]}, "leave 'embeddings' out"),
    ],
)
def test_what_means_nothing_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        FineTuningConfig(**settings)
    assert FineTuningConfig(special_tokens="<a>").special_tokens == ["<a>"]


SHAPE = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
HUGGING_FACE: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=32, n_layer=1, n_head=2, n_positions=64)),
    "gemma, which scales its embeddings": lambda: GemmaForCausalLM(GemmaConfig(**SHAPE, head_dim=16)),
}


@pytest.mark.parametrize("family", HUGGING_FACE)
def test_peft_reads_the_new_tokens_of_every_family(family: str, tune: Any, text: Any, tmp_path: Path) -> None:
    """On the base model grown to the adapter's tokenizer, which is all that PEFT's users do."""

    def make() -> Any:
        torch.manual_seed(0)
        model = HUGGING_FACE[family]().eval()
        model.tokenizer = byte_tokenizer()
        return model

    model = make()
    tune(model, text(), special_tokens=TOKENS, lora_rank=2, num_epochs=2, output_dir=tmp_path / "run")
    base = make()
    base.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)
    read = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    ids = torch.tensor([[258, 5, 259, 1]])
    torch.testing.assert_close(read(ids).logits, model(ids).logits)
    own = make()
    load_adapter(own, tmp_path / "run" / "adapter")
    assert torch.equal(own(ids).logits, model(ids).logits)
