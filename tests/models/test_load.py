"""Loading gives the source library's logits, and refuses what is broken, unsafe or not there."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from llmbuilder.errors import ConfigError, LLMBuilderError
from llmbuilder.models import GPT, GPTConfig, byte_tokenizer, load_model, save_model, tie_groups

IDS = torch.tensor([[5, 70, 200, 7, 7, 33, 104, 2, 90, 61, 18]])
ToFolder = Callable[[nn.Module], Path]


class Attack:
    """Pickles into a call that leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_hugging_face_folder_gives_transformers_logits(
    family: nn.Module, hugging_face_folder: ToFolder, dtype: str
) -> None:
    folder = hugging_face_folder(family)
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype)
    ours = load_model(folder, dtype=dtype)
    assert ours.dtype == torch_dtype and not ours.training
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
        if dtype == "fp32":
            assert torch.equal(ours(IDS).logits, family(IDS).logits)
    assert ours.tokenizer("aé").input_ids == [97, 195, 169]


def test_auto_keeps_the_stored_dtype(make_family: Callable, hugging_face_folder: ToFolder, tmp_path: Path) -> None:
    assert load_model(hugging_face_folder(make_family("llama").to(torch.bfloat16))).dtype == torch.bfloat16
    save_model(GPT(GPTConfig(264, 1, 2, 16, 8)).to(torch.bfloat16), tmp_path / "native")
    assert load_model(tmp_path / "native").head.weight.dtype == torch.bfloat16
    assert load_model(tmp_path / "native", dtype=torch.float32).head.weight.dtype == torch.float32


def test_an_unknown_dtype_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="got 'bf61'; did you mean 'bf16'"):
        load_model("anything", dtype="bf61")


@pytest.mark.parametrize("kind", ["model.pt", "native", "llama"])
def test_weights_have_storage_of_their_own_aligned_to_64_bytes(
    kind: str, gpt: GPT, make_family: Callable, hugging_face_folder: ToFolder, tmp_path: Path
) -> None:
    path = hugging_face_folder(make_family(kind)) if kind == "llama" else tmp_path / kind
    if kind != "llama":
        save_model(gpt, path)
    model = load_model(path)
    weights = [*model.parameters(), *model.buffers()]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == len(weights)
    for weight in weights:
        assert weight.data_ptr() % 64 == 0
        assert weight.is_contiguous() and weight.untyped_storage().nbytes() == weight.nbytes
        weight.data.zero_()  # ... and nothing of the file is mapped into them
    again = load_model(path)
    assert all(weight.count_nonzero() for weight in again.parameters())


def test_weights_stay_tied(make_family: Callable, hugging_face_folder: ToFolder) -> None:
    model = load_model(hugging_face_folder(make_family("qwen2")))
    assert tie_groups(model) == [["model.embed_tokens.weight", "lm_head.weight"]]


def test_a_folder_with_model_pt_is_native(gpt: GPT, tmp_path: Path) -> None:
    save_model(gpt, tmp_path / "model.pt")
    assert torch.equal(load_model(str(tmp_path)).state_dict()["norm.weight"], gpt.norm.weight)


# --- tokenizers ---


def test_a_native_model_without_a_tokenizer_gets_the_byte_level_one_where_it_fits(gpt: GPT, tmp_path: Path) -> None:
    save_model(gpt, tmp_path / "model.pt")
    assert load_model(tmp_path / "model.pt").tokenizer.get_vocab() == byte_tokenizer().get_vocab()
    save_model(GPT(GPTConfig(257, 1, 2, 16, 8)), tmp_path / "model.pt")
    assert load_model(tmp_path / "model.pt").tokenizer is None


def test_a_missing_padding_token_becomes_the_end_of_text(make_family: Callable, hugging_face_folder: ToFolder) -> None:
    folder = hugging_face_folder(make_family("llama"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer().backend_tokenizer, eos_token="<|endoftext|>"
    )
    assert tokenizer.pad_token is None
    tokenizer.save_pretrained(folder)
    assert load_model(folder).tokenizer.pad_token_id == 256


def test_a_missing_tokenizer_is_an_error_that_says_where(make_family: Callable, tmp_path: Path) -> None:
    make_family("llama").save_pretrained(tmp_path / "bare")
    with pytest.raises(LLMBuilderError, match=f"cannot load the tokenizer in {tmp_path / 'bare'}"):
        load_model(tmp_path / "bare")


# --- unsafe files ---


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_by_name_and_not_run(tmp_path: Path, zipped: bool, protocol: int) -> None:
    content = {"model_type": "llmbuilder-gpt", "weights": {"head.weight": Attack(tmp_path / "mark")}}
    path = tmp_path / "model.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    with pytest.raises(
        LLMBuilderError, match=r"model\.pt was refused and nothing in it was run.*posix\.system"
    ) as error:
        load_model(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "mark").exists()
    pickle.loads(pickle.dumps(Attack(tmp_path / "mark")))  # the attack itself works
    assert (tmp_path / "mark").exists()


def test_malicious_hugging_face_weights_are_refused_by_name_and_not_run(
    make_family: Callable, hugging_face_folder: ToFolder, tmp_path: Path
) -> None:
    model = make_family("llama")
    folder = hugging_face_folder(model)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert torch.equal(load_model(folder).lm_head.weight, model.lm_head.weight), "honest .bin weights are read"
    torch.save({**model.state_dict(), "extra": Attack(tmp_path / "mark")}, folder / "pytorch_model.bin")
    with pytest.raises(LLMBuilderError, match=r"pytorch_model\.bin was refused.*posix\.system"):
        load_model(folder)
    assert not (tmp_path / "mark").exists()


def test_code_beside_a_model_is_never_imported(
    make_family: Callable, hugging_face_folder: ToFolder, tmp_path: Path
) -> None:
    folder = hugging_face_folder(make_family("llama"))
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    with pytest.raises(LLMBuilderError, match="cannot load the"):
        load_model(folder)
    assert not (tmp_path / "mark").exists()


# --- broken files ---


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["model.pt", "native", "llama"])
def test_truncated_weights_are_one_clear_error(
    kind: str, share: float, gpt: GPT, make_family: Callable, hugging_face_folder: ToFolder, tmp_path: Path
) -> None:
    if kind == "llama":
        file = hugging_face_folder(make_family("llama")) / "model.safetensors"
    else:
        save_model(gpt, tmp_path / kind)
        file = tmp_path / kind if kind == "model.pt" else tmp_path / kind / "model.safetensors"
    os.truncate(file, int(file.stat().st_size * share))
    with pytest.raises(LLMBuilderError, match=str(file if kind != "llama" else file.parent)):
        load_model(file if kind == "model.pt" else file.parent)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["native", "llama"])
def test_a_corrupt_side_file_is_one_clear_error(
    kind: str, name: str, gpt: GPT, make_family: Callable, hugging_face_folder: ToFolder, tmp_path: Path
) -> None:
    if kind == "llama":
        folder = hugging_face_folder(make_family("llama"))
    else:
        gpt.tokenizer = byte_tokenizer()
        save_model(gpt, folder := tmp_path / kind)
    (folder / name).write_text('{"half": ')
    with pytest.raises(LLMBuilderError, match=str(folder)):
        load_model(folder)


def test_missing_weights_are_an_error_never_fresh_noise(make_family: Callable, hugging_face_folder: ToFolder) -> None:
    model = make_family("llama")
    folder = hugging_face_folder(model)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "model.norm.weight"}
    model.save_pretrained(folder, state_dict=weights)
    with pytest.raises(LLMBuilderError, match=r"incomplete.*1 missing weights, such as model\.norm\.weight"):
        load_model(folder)


def test_weights_of_another_shape_are_an_error(
    gpt: GPT, make_family: Callable, hugging_face_folder: ToFolder, tmp_path: Path
) -> None:
    save_model(gpt, tmp_path / "native")
    for folder, key in ((tmp_path / "native", "n_embd"), (hugging_face_folder(make_family("llama")), "hidden_size")):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: 64}))
        with pytest.raises(LLMBuilderError, match=str(folder)):
            load_model(folder)


def test_an_unknown_setting_in_a_native_config_is_an_error(gpt: GPT, tmp_path: Path) -> None:
    save_model(gpt, tmp_path / "native")
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    (tmp_path / "native" / "config.json").write_text(json.dumps({**config, "n_experts": 3}))
    with pytest.raises(LLMBuilderError, match="n_experts"):
        load_model(tmp_path / "native")


# --- no model there ---


def test_a_torch_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(LLMBuilderError, match="no checkpoint of an llmbuilder GPT"):
        load_model(tmp_path / "other.pt")


@pytest.mark.parametrize("name", ["no/such/folder", "./nothing", "nothing.gguf/", "a b"])
def test_a_path_with_nothing_there_is_refused(name: str) -> None:
    with pytest.raises(LLMBuilderError, match="there is no file or folder"):
        load_model(name)


def test_a_path_with_a_wrong_end_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    with pytest.raises(LLMBuilderError, match="no file or folder runs/dmo; did you mean 'runs/demo'"):
        load_model("runs/dmo")


@pytest.mark.usefixtures("offline")
def test_a_hub_id_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(
        LLMBuilderError, match="no file or folder here, and it could not be had from the Hugging Face hub"
    ):
        load_model("no-such-owner/no-such-model")


def test_a_folder_without_a_model_says_what_it_lacks_and_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(LLMBuilderError, match=r"holds no model: no config\.json, model\.pt or \.gguf file$"):
        load_model(tmp_path)
    (tmp_path / "adapter").mkdir()
    with pytest.raises(LLMBuilderError, match=f"did you mean {tmp_path / 'adapter'}"):
        load_model(tmp_path)


def test_an_adapter_folder_names_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(LLMBuilderError, match=r"holds an adapter, not a model; load its base model \(some/base\)"):
        load_model(tmp_path)


def test_an_adapter_beside_a_model_is_refused(make_family: Callable, hugging_face_folder: ToFolder) -> None:
    folder = hugging_face_folder(make_family("llama"))
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(LLMBuilderError, match="holds an adapter beside the model; move the adapter"):
        load_model(folder)


def test_a_quantised_base_is_refused_by_name(make_family: Callable, hugging_face_folder: ToFolder) -> None:
    folder = hugging_face_folder(make_family("llama"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LLMBuilderError, match="quantised bases can't be loaded yet"):
        load_model(folder)


def test_a_checkpoint_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    torch.save({"model_type": "llmbuilder-gpt", "config": {}}, tmp_path / "model.pt")
    with pytest.raises(LLMBuilderError, match="no checkpoint of an llmbuilder GPT"):
        load_model(tmp_path / "model.pt")


def test_several_gguf_files_ask_for_one(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(LLMBuilderError, match=r"several GGUF files; give one of them: a\.gguf, b\.gguf"):
        load_model(tmp_path)


def test_a_single_weight_file_asks_for_its_folder(
    make_family: Callable, hugging_face_folder: ToFolder, tmp_path: Path
) -> None:
    folder = hugging_face_folder(make_family("llama"))
    with pytest.raises(LLMBuilderError, match="give the folder that holds it"):
        load_model(folder / "model.safetensors")
    shutil.copytree(folder, tmp_path / "copy")
    assert load_model(tmp_path / "copy").config.hidden_size == 32
