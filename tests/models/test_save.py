"""A saved model comes back bit for bit, and a save that fails leaves what was there."""

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from llmbuilder.errors import LLMBuilderError
from llmbuilder.models import GPT, GPTConfig, byte_tokenizer, load_model, replacing, save_model, tie_groups

IDS = torch.tensor([[5, 70, 200, 7, 7, 33, 104, 2, 90, 61, 18]])
KINDS = ["model.pt", "folder"]


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """The same names, dtypes, bits and ties."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs) and tie_groups(a) == tie_groups(b)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    with torch.no_grad():
        assert torch.equal(a(IDS).logits, b(IDS).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_native_model_round_trips(tmp_path: Path, kind: str, dtype: torch.dtype, tied: bool) -> None:
    model = GPT(GPTConfig(264, 2, 4, 32, 64, dropout=0.1, tie_word_embeddings=tied)).to(dtype).eval()
    model.tokenizer = byte_tokenizer()
    model.tokenizer.chat_template = "{{ messages[0].content }}"
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    save_model(model, tmp_path / kind)
    again = load_model(tmp_path / kind)
    assert_same(model, again)
    assert again.config == model.config
    assert again.tokenizer("é<turn>").input_ids == [195, 169, 258]
    assert again.tokenizer.chat_template == model.tokenizer.chat_template


def test_a_hugging_face_model_round_trips(family: nn.Module, tmp_path: Path) -> None:
    family.tokenizer = byte_tokenizer()
    save_model(family, tmp_path / "folder")
    again = load_model(tmp_path / "folder")
    assert_same(family, again)
    assert again.tokenizer("é").input_ids == [195, 169]


def test_a_tied_weight_is_stored_once(gpt: GPT, tmp_path: Path) -> None:
    save_model(gpt, tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert "embedding.weight" in content["weights"] and "head.weight" not in content["weights"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_was_untied_since_stays_untied(gpt: GPT, tmp_path: Path, kind: str) -> None:
    gpt.head.weight = nn.Parameter(gpt.head.weight.detach() * 2)
    save_model(gpt, tmp_path / kind)
    assert_same(gpt, load_model(tmp_path / kind))
    assert gpt.config.tie_word_embeddings, "saving changes nothing in the model"


def test_an_untied_hugging_face_head_stays_untied(make_family: Callable[[str], nn.Module], tmp_path: Path) -> None:
    model = make_family("qwen2")
    model.tokenizer = byte_tokenizer()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    save_model(model, tmp_path / "folder")
    assert_same(model, load_model(tmp_path / "folder"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_is_replaced(gpt: GPT, tmp_path: Path, kind: str) -> None:
    save_model(gpt, tmp_path / kind)
    gpt.norm.weight.data += 1
    save_model(gpt, tmp_path / kind)
    assert_same(gpt, load_model(tmp_path / kind))
    assert os.listdir(tmp_path) == [kind], "no temporary file or folder is left"


def test_folders_above_are_made(gpt: GPT, tmp_path: Path) -> None:
    save_model(gpt, tmp_path / "a" / "b" / "model.pt")
    assert_same(gpt, load_model(tmp_path / "a" / "b"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_a_save_that_fails_leaves_the_old_model_and_nothing_else(
    gpt: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, step: str
) -> None:
    save_model(gpt, tmp_path / kind)
    before = load_model(tmp_path / kind)
    gpt.norm.weight.data += 1

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {"write": f"llmbuilder.models.save.{'torch.save' if kind == 'model.pt' else 'save_file'}"}
    target |= {"fsync": "os.fsync", "rename": "pathlib.Path.replace"}
    monkeypatch.setattr(target[step], fail)
    with pytest.raises(OSError, match="No space left"):
        save_model(gpt, tmp_path / kind)
    monkeypatch.undo()
    assert_same(before, load_model(tmp_path / kind))
    assert os.listdir(tmp_path) == [kind]


@pytest.mark.parametrize("folder", [False, True])
def test_everything_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def spy_sync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        events.append(f"sync {kind} {os.fstat(descriptor).st_ino}")
        fsync(descriptor)

    def spy_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", spy_sync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    path = tmp_path / "target"
    with replacing(path) as temporary:
        if folder:
            (temporary / "inner").mkdir(parents=True)
        for file in [temporary / "a", temporary / "inner" / "b"] if folder else [temporary]:
            file.write_text("x")
        assert not path.exists()
    renamed = events.index("rename")
    written = [path, *path.rglob("*")]
    assert {f"sync {'folder' if p.is_dir() else 'file'} {p.stat().st_ino}" for p in written} == set(events[:renamed])
    assert events[renamed + 1 :] == [f"sync folder {tmp_path.stat().st_ino}"]


@pytest.mark.parametrize("error", [OSError("broken"), KeyboardInterrupt("broken")])
def test_a_save_that_fails_between_the_renames_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "target"
    path.mkdir()
    (path / "old").touch()

    def fail(self: Path, target: Path) -> None:
        assert not path.exists(), "the old folder has moved aside"
        raise error

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(type(error), match="broken"), replacing(path) as temporary:
        temporary.mkdir()
    assert os.listdir(path) == ["old"] and os.listdir(tmp_path) == ["target"]


def test_a_folder_with_anything_else_in_it_is_never_replaced(gpt: GPT, tmp_path: Path) -> None:
    save_model(gpt, folder := tmp_path / "folder")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(LLMBuilderError, match=r"holds notes\.txt, which is no part of a saved model"):
        save_model(gpt, folder)
    (folder / "notes.txt").unlink()
    (folder / "data").mkdir()
    with pytest.raises(LLMBuilderError, match="holds data, which is no part"):
        save_model(gpt, folder)
    assert_same(gpt, load_model(folder))


def test_a_file_in_the_place_of_a_folder_is_not_replaced(gpt: GPT, tmp_path: Path) -> None:
    (tmp_path / "thing").write_text("mine")
    with pytest.raises(LLMBuilderError, match="is a file; give a folder's name"):
        save_model(gpt, tmp_path / "thing")
    assert (tmp_path / "thing").read_text() == "mine"


def test_a_folder_in_the_place_of_a_pt_file_is_not_replaced(gpt: GPT, tmp_path: Path) -> None:
    (tmp_path / "model.pt").mkdir()
    (tmp_path / "model.pt" / "mine").touch()
    with pytest.raises(LLMBuilderError, match="is a folder"):
        save_model(gpt, tmp_path / "model.pt")
    assert (tmp_path / "model.pt" / "mine").exists()


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_a_model_with_adapters_is_refused(gpt: GPT, tmp_path: Path, name: str) -> None:
    gpt.blocks[1].attention.query.register_parameter(name, nn.Parameter(torch.zeros(2, 2)))
    with pytest.raises(
        LLMBuilderError, match=rf"has adapters \(blocks\.1\.attention\.query\.{name}\); merge them first"
    ):
        save_model(gpt, tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


def test_what_is_no_model_of_ours_is_refused(make_family: Callable[[str], nn.Module], tmp_path: Path) -> None:
    with pytest.raises(LLMBuilderError, match="Linear is neither a GPT nor a transformers model"):
        save_model(nn.Linear(2, 2), tmp_path / "folder")
    with pytest.raises(LLMBuilderError, match=r"only a native GPT fits in a \.pt file"):
        save_model(make_family("llama"), tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


def test_a_native_folder_says_what_it_is(gpt: GPT, tmp_path: Path) -> None:
    save_model(gpt, tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config == {"model_type": "llmbuilder-gpt", **gpt.config.to_dict()}
