"""Adapters as files: PEFT reads ours, we read PEFT's, and whatever can't be read is refused with the reason."""

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmbuilder.errors import LLMBuilderError
from llmbuilder.nn import (
    LoRAConfig,
    LoRALinear,
    activate_adapters,
    active_adapters,
    add_lora,
    combine_adapters,
    list_adapters,
    load_adapter,
    merge_lora,
    save_adapter,
)

Make = Callable[[str], nn.Module]
Logits = Callable[[nn.Module], Tensor]
Adapted = Callable[..., nn.Module]
EVERYTHING = ["attention", "mlp", "embeddings"]


def settings(family: str) -> dict[str, LoRAConfig]:
    """What an adapter can have beside A and B of whole layers and of slices."""
    head = "head" if family == "native" else "lm_head"
    norms = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm", "phi": "final_layernorm"}
    norm = norms.get(family, "norm")  # in some families the end of every norm's name
    return {
        "low rank": LoRAConfig(rank=3, dropout=0.1, target_modules=EVERYTHING, use_rslora=True),
        "biases of layers": LoRAConfig(rank=2, alpha=3, bias="lora_only", target_modules=["attention.value", "mlp"]),
        "whole modules and biases": LoRAConfig(rank=2, modules_to_save=[head, norm], bias="all"),
    }


KINDS = list(settings("llama"))


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_ours(
    kind: str, family: str, adapted: Adapted, make: Make, logits: Logits, assert_close: Callable, tmp_path: Path
) -> None:
    model = adapted(family, settings(family)[kind])
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(make(family), tmp_path / "adapter")
    assert not torch.equal(logits(model), logits(make(family)))
    assert_close(logits(theirs), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_we_read_pefts(
    kind: str, family: str, make: Make, shuffle: Callable, logits: Logits, assert_close: Callable, tmp_path: Path
) -> None:
    config = settings(family)[kind]
    model = make(family)
    embedding = next(path for path, module in model.named_modules() if module is model.get_input_embeddings())
    layers = {
        "gpt2": ["c_attn", "c_proj", "c_fc"],
        "gpt_neox": ["query_key_value", "dense_4h_to_h"],
        "phi3": ["qkv_proj", "down_proj"],
        "phi": ["q_proj", "fc1"],
        "native": ["query", "down"],
    }.get(family, ["q_proj", "down_proj"])
    theirs = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=5,
            target_modules=[*layers, embedding.rpartition(".")[2]] if kind == "low rank" else layers,
            rank_pattern={layers[0]: 4},
            alpha_pattern={rf"\d+\.\w+\.{layers[1]}": 7},
            bias=config.bias,
            use_rslora=config.use_rslora,
            modules_to_save=config.modules_to_save or None,
            fan_in_fan_out=family == "gpt2",
        ),
    )
    shuffle(theirs).save_pretrained(tmp_path)
    ours = make(family)
    load_adapter(ours, tmp_path, name="theirs")
    assert active_adapters(ours) == {"theirs": 1.0}
    assert_close(logits(ours), logits(theirs))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_comes_back_bit_for_bit(
    kind: str, family: str, adapted: Adapted, make: Make, logits: Logits, tmp_path: Path
) -> None:
    config = settings(family)[kind]
    model = adapted(family, config)
    save_adapter(model, tmp_path / "adapter")
    other = make(family)
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(logits(other), logits(model))
    mine, again = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in (model, other))
    assert mine.keys() == again.keys()  # parts of fused layers are parts again
    assert all(torch.equal(mine[name], again[name]) for name in mine)
    read = list_adapters(other)["default"]
    same = ("rank", "alpha", "dropout", "bias", "use_rslora")
    assert all(getattr(read, field) == getattr(config, field) for field in same)


def test_what_peft_saves_again_reads_as_the_whole_layer(
    adapted: Adapted, make: Make, logits: Logits, assert_close: Callable, tmp_path: Path
) -> None:
    """PEFT drops what our header remembers of slices; the sum that they stand for stays."""
    model = adapted("gpt_neox", LoRAConfig(rank=2, target_modules=["attention.query", "attention.value"]))
    save_adapter(model, tmp_path / "ours")
    peft.PeftModel.from_pretrained(make("gpt_neox"), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    other = make("gpt_neox")
    load_adapter(other, tmp_path / "theirs")
    assert {name.rpartition(".")[2] for name, _ in other.named_parameters() if "lora_A" in name} == {"weight"}
    assert_close(logits(other), logits(model))


def test_slices_that_were_trained_as_a_whole_stay_whole(
    adapted: Adapted, make: Make, logits: Logits, tmp_path: Path
) -> None:
    """Values outside a part's rows are not lost."""
    model = adapted("gpt2", LoRAConfig(rank=2, target_modules=["attention.query"]))
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    key = next(name for name in tensors if "lora_B" in name)
    tensors[key] = torch.randn_like(tensors[key])
    save_file(tensors, file, metadata)
    theirs = peft.PeftModel.from_pretrained(make("gpt2"), tmp_path)
    ours = make("gpt2")
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)


def test_one_of_several_is_saved_and_several_are_loaded(
    adapted: Adapted, make: Make, shuffle: Callable, logits: Logits, tmp_path: Path
) -> None:
    model = adapted("llama", LoRAConfig(rank=1), name="first")
    first = logits(model)
    add_lora(model, LoRAConfig(rank=2, target_modules="all"), name="second")
    second = logits(shuffle(model))
    for name in ("first", "second"):
        save_adapter(model, tmp_path / name, name)
    activate_adapters(model, [])
    with pytest.raises(LLMBuilderError, match="which one\\? name= one of first, second"):
        save_adapter(model, tmp_path / "unknown")
    other = make("llama")
    for name in ("first", "second"):
        load_adapter(other, tmp_path / name, name)
    assert torch.equal(logits(other), second)
    activate_adapters(other, "first")
    assert torch.equal(logits(other), first)


def test_a_combination_of_unequal_ranks_is_written_with_patterns(
    adapted: Adapted, make: Make, shuffle: Callable, logits: Logits, assert_close: Callable, tmp_path: Path
) -> None:
    model = adapted("llama", LoRAConfig(rank=2, target_modules=["q_proj"]), name="first")
    add_lora(model, LoRAConfig(rank=3, target_modules=["q_proj", "up_proj"]), name="second")
    combine_adapters(shuffle(model), "both", {"first": 0.5, "second": 2})
    save_adapter(model, tmp_path, "both")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {config["r"], *config["rank_pattern"].values()} == {3, 5}
    assert_close(logits(peft.PeftModel.from_pretrained(make("llama"), tmp_path)), logits(model))


def test_a_merged_adapter_is_saved_as_what_it_is(adapted: Adapted, tmp_path: Path) -> None:
    model = adapted("llama", LoRAConfig(rank=2))
    save_adapter(model, tmp_path / "before")
    merge_lora(model)
    save_adapter(model, tmp_path / "after")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_files_are_pefts(adapted: Adapted, tmp_path: Path) -> None:
    save_adapter(adapted("llama", LoRAConfig(rank=2, target_modules=["q_proj"])), tmp_path)
    keys = {f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{m}.weight" for i in range(2) for m in "AB"}
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == keys
    config = peft.LoraConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha, config.task_type) == (2, 4, "CAUSAL_LM")
    assert set(config.target_modules) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}


def test_saving_again_replaces_the_adapter_and_keeps_other_files(adapted: Adapted, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_adapter(adapted("llama", LoRAConfig(rank=2, target_modules="all")), folder)
    (folder / "README.md").write_text("mine")
    save_adapter(adapted("llama", LoRAConfig(rank=3, target_modules=["q_proj"])), folder)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3
    assert len(load_file(folder / "adapter_model.safetensors")) == 4
    assert (folder / "README.md").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_a_failed_save_leaves_the_old_one(adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmbuilder.nn import peft_format

    folder = tmp_path / "adapter"
    model = adapted("llama", LoRAConfig(rank=2))
    save_adapter(model, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(peft_format, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.fixture
def saved(adapted: Adapted, tmp_path: Path) -> Path:
    """A good adapter of a Llama, to be spoilt."""
    save_adapter(adapted("llama", LoRAConfig(rank=2, target_modules=["q_proj"])), tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(model: nn.Module, folder: Path, said: str) -> None:
    """Loading raises what is ``said``, and leaves the model as it was."""
    modules = dict(model.named_modules())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(LLMBuilderError, match=said):
        load_adapter(model, folder)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora is not yet available"),
        ({"lora_bias": True}, "lora_bias is not yet available"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is not yet available"),
        ({"trainable_token_indices": {"a": [3], "b": [4]}}, "trainable_token_indices that differ by layer"),
        ({"something_new": {"a": 1}}, "something_new is not yet available"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base's weights"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA adapters can be read"),
        ({"r": "two"}, "r should be a positive number, and is 'two'"),
        ({"r": True}, "r should be a positive number, and is True"),
        ({"lora_alpha": 0}, "lora_alpha should be a positive number, and is 0"),
        ({"lora_alpha": float("inf")}, "lora_alpha should be a positive number, and is inf"),
        ({"alpha_pattern": "x"}, "alpha_pattern should be a mapping of regular expressions to positive numbers"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern should be a mapping of regular expressions to positive numbers"),
        ({"alpha_pattern": {"q_proj": "3"}}, "alpha_pattern should be a mapping .* and is {'q_proj': '3'}"),
        ({"rank_pattern": [1]}, "rank_pattern should be a mapping"),
        ({"lora_dropout": 1}, "lora_dropout should be 0, or a positive number below 1, and is 1"),
        ({"use_rslora": "x"}, "use_rslora should be true or false, and is 'x'"),
        ({"bias": "some"}, "bias should be none, all or lora_only, and is 'some'"),
        ({"modules_to_save": 5}, "modules_to_save should be a list of names, and is 5"),
        ({"modules_to_save": [""]}, "modules_to_save should be a list of names"),
        ({"modules_to_save": ["nope"]}, "modules_to_save has 'nope', which this model lacks"),
        ({"trainable_token_indices": "x"}, "trainable_token_indices should be a list of token ids"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices should be a list of token ids"),
        ({"trainable_token_indices": {"embed_tokens": 3}}, "trainable_token_indices should be a list of token ids"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(
    change: dict[str, object], said: str, saved: Path, make: Make
) -> None:
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(make("llama"), saved, said)


def test_a_pickle_is_refused(saved: Path, make: Make) -> None:
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    refused(make("llama"), saved, "adapter_model.bin is a pickle, which can run code")


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path, make: Make) -> None:
    refused(make("llama"), tmp_path, "holds no adapter: adapter_config.json can't be read")
    refused(make("llama"), tmp_path / "missing", "holds no adapter")


def test_damaged_files_are_refused(saved: Path, make: Make) -> None:
    weights, config = saved / "adapter_model.safetensors", saved / "adapter_config.json"
    whole = weights.read_bytes()
    for kept in (0, 7, 100, len(whole) - 1):
        weights.write_bytes(whole[:kept])
        refused(make("llama"), saved, "adapter_model.safetensors can't be read")
    weights.unlink()
    refused(make("llama"), saved, "adapter_model.safetensors can't be read")
    config.write_text(config.read_text()[:-9])
    refused(make("llama"), saved, "is no valid JSON")


def test_an_adapter_of_another_model_is_refused(saved: Path, adapted: Adapted, make: Make, tmp_path: Path) -> None:
    refused(make("gpt2"), saved, "it has a weight for 'model.layers.0.self_attn.q_proj', which this model lacks")
    save_adapter(adapted("qwen3", LoRAConfig(rank=2, target_modules=["q_proj"])), tmp_path / "wider")
    refused(make("llama"), tmp_path / "wider", r"q_proj' has 32 inputs and 32 outputs here, which lora_A \[2, 32\]")


def spoil(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_tensors_that_are_missing_or_unknown_are_named(
    saved: Path, make: Make, adapted: Adapted, tmp_path: Path
) -> None:
    first = "base_model.model.model.layers.0.self_attn.q_proj"
    spoil(saved, lambda tensors: tensors.update({f"{first}.lora_magnitude_vector": torch.ones(32)}))
    refused(make("llama"), saved, "q_proj.lora_magnitude_vector belongs to no kind of adapter that is available")
    spoil(saved, lambda tensors: [tensors.pop(f"{first}.{end}") for end in ("lora_magnitude_vector", "lora_B.weight")])
    refused(make("llama"), saved, "q_proj' has lora_A or lora_B, but not both")
    spoil(saved, lambda tensors: [tensors.pop(key) for key in list(tensors)])
    refused(make("llama"), saved, "holds no lora_A and lora_B")
    save_adapter(adapted("llama", LoRAConfig(rank=1, modules_to_save=["lm_head"])), tmp_path / "head")
    spoil(tmp_path / "head", lambda tensors: tensors.pop("base_model.model.lm_head.weight"))
    refused(make("llama"), tmp_path / "head", r"it has nothing for lm_head.weight, the model \[61, 32\]")


def test_an_embedding_of_another_base_is_refused(make: Make, tmp_path: Path) -> None:
    """PEFT writes the base of an adapted embedding too, so that a wrong base shows."""
    theirs = peft.get_peft_model(make("llama"), peft.LoraConfig(target_modules=["embed_tokens"]))
    theirs.save_pretrained(tmp_path)
    load_adapter(make("llama"), tmp_path)
    other = make("llama")
    with torch.no_grad():
        other.model.embed_tokens.weight[3] += 1
    refused(other, tmp_path, "embed_tokens.base_layer.weight holds a base weight that differs from this model's")


def test_a_name_that_is_taken_is_refused(saved: Path, make: Make, logits: Logits) -> None:
    model = make("llama")
    load_adapter(model, saved)
    before = logits(model)
    with pytest.raises(LLMBuilderError, match="has an adapter called 'default'"):
        load_adapter(model, saved)
    assert torch.equal(logits(model), before)


def test_loaded_weights_live_in_storage_of_their_own(saved: Path, make: Make) -> None:
    model = make("llama")
    load_adapter(model, saved)
    layer = next(module for module in model.modules() if isinstance(module, LoRALinear))
    for parameter in layer.adapters.parameters():
        assert parameter.data_ptr() % 64 == 0
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test_equal_adapters_are_equal_files(make: Make, tmp_path: Path) -> None:
    """GPT-2's file has two entries of metadata, whose order safetensors leaves to chance."""
    model = make("gpt2")
    add_lora(model, LoRAConfig(rank=2))
    files = set()
    for turn in range(8):
        save_adapter(model, tmp_path / str(turn))
        files.add((tmp_path / str(turn) / "adapter_model.safetensors").read_bytes())
    assert len(files) == 1
    with safe_open(tmp_path / "0" / "adapter_model.safetensors", "pt") as file:
        assert list(file.metadata()) and file.metadata()["format"] == "pt"
