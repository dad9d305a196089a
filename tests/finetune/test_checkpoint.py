"""A checkpoint is whole, or it is not used."""

import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmbuilder.errors import LLMBuilderError
from llmbuilder.finetune.checkpoint import (
    Checkpoint,
    find_fault,
    join_states,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    split_states,
)


@pytest.fixture
def content() -> Checkpoint:
    torch.manual_seed(0)
    tensors = {
        "trained": {"a.weight": torch.randn(3, 5), "b": torch.randn(4, 2).bfloat16().T, "step": torch.tensor(3.0)},
        "random": {"cpu": torch.get_rng_state()},
        "empty": {},
    }
    return Checkpoint(tensors, {"progress": {"loss": 0.1 + 0.2, "best": float("inf")}, "text": "ä"})


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path, content: Checkpoint) -> None:
    path = save_checkpoint(tmp_path, 7, content)
    assert path == tmp_path / "step-7" == newest_checkpoint(tmp_path)
    loaded = load_checkpoint(path)
    assert loaded.values == content.values
    assert loaded.tensors.keys() == content.tensors.keys()
    for group, tensors in content.tensors.items():
        assert loaded.tensors[group].keys() == tensors.keys()
        for name, value in tensors.items():
            assert loaded.tensors[group][name].dtype == value.dtype
            assert torch.equal(loaded.tensors[group][name], value)


def damage_each_file(path: Path) -> list[tuple[str, Callable[[], Any]]]:
    """Every way to hurt a checkpoint that the tests try, with a name."""
    ways: list[tuple[str, Callable[[], Any]]] = []
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        cuts = {0, 1, len(whole) // 2, len(whole) - 1}
        ways += [(f"{file.name} cut to {n}", lambda f=file, w=whole, n=n: f.write_bytes(w[:n])) for n in sorted(cuts)]
        for place in sorted({0, 9, len(whole) // 3, len(whole) // 2, len(whole) - 2, len(whole) - 1}):
            for bit in (0, 5):
                flipped = bytearray(whole)
                flipped[place] ^= 1 << bit
                ways.append(
                    (f"{file.name} bit {bit} of byte {place}", lambda f=file, b=bytes(flipped): f.write_bytes(b))
                )
        ways.append((f"{file.name} missing", file.unlink))
    return ways


def test_any_truncated_flipped_or_missing_file_is_noticed(tmp_path: Path, content: Checkpoint) -> None:
    path = save_checkpoint(tmp_path, 1, content)
    whole = {file: file.read_bytes() for file in path.iterdir()}
    ways = damage_each_file(path)
    assert len(ways) > 50
    unnoticed = []
    for name, damage in ways:
        damage()
        if find_fault(path) is None:
            unnoticed.append(name)
        for file, content_bytes in whole.items():
            file.write_bytes(content_bytes)
        assert find_fault(path) is None
    assert unnoticed == []


def test_a_file_that_the_manifest_does_not_list_is_noticed(tmp_path: Path, content: Checkpoint) -> None:
    path = save_checkpoint(tmp_path, 1, content)
    (path / "more.safetensors").write_bytes((path / "trained.safetensors").read_bytes())
    assert "manifest.json lists" in str(find_fault(path))


def test_the_last_whole_one_is_found_and_each_broken_one_is_named(tmp_path: Path, content: Checkpoint) -> None:
    for step in (2, 9, 10, 11):
        save_checkpoint(tmp_path, step, content)
    (tmp_path / "step-11" / "trained.safetensors").write_bytes(b"")
    (tmp_path / "step-10" / "manifest.json").unlink()
    with pytest.warns(UserWarning) as told:
        assert newest_checkpoint(tmp_path) == tmp_path / "step-9"
    texts = [str(warning.message) for warning in told]
    assert ["step-11" in texts[0] and "trained.safetensors is damaged" in texts[0], "step-10" in texts[1]] == [
        True,
        True,
    ]


def test_nothing_is_found_in_an_empty_or_missing_folder(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_leftovers_of_an_interrupted_save_are_removed(tmp_path: Path, content: Checkpoint) -> None:
    path = save_checkpoint(tmp_path, 3, content)
    path.rename(tmp_path / ".step-3.0123abcd.new")
    (tmp_path / "notes.txt").write_text("mine")
    assert newest_checkpoint(tmp_path) is None
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_one_is_replaced_by_a_new_save(tmp_path: Path, content: Checkpoint) -> None:
    path = save_checkpoint(tmp_path, 3, content)
    (path / "state.json").write_text("")
    save_checkpoint(tmp_path, 3, content)
    assert find_fault(path) is None


@pytest.mark.parametrize("call", range(1, 8))
def test_a_full_disk_is_an_error_and_the_last_good_one_stays(
    tmp_path: Path, content: Checkpoint, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    save_checkpoint(tmp_path, 1, content)
    calls = iter(range(1, 100))
    sync = os.fsync

    def full(descriptor: int) -> None:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LLMBuilderError, match=r"step-2: cannot be saved \(No space left on device\); free some space"):
        save_checkpoint(tmp_path, 2, content)
    found = newest_checkpoint(tmp_path)
    # The last sync is that of the folder of names, when the new one is in place already.
    assert found == tmp_path / ("step-2" if (tmp_path / "step-2").exists() else "step-1")
    assert sorted(path.name for path in tmp_path.iterdir())[0] == "step-1"


def test_every_file_is_synced_before_the_rename_and_the_folder_after(
    tmp_path: Path, content: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, replace = os.fsync, Path.replace

    def log_sync(descriptor: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def log_replace(path: Path, target: Path) -> Path:
        events.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", log_sync)
    monkeypatch.setattr(Path, "replace", log_replace)
    path = save_checkpoint(tmp_path, 1, content)
    renamed = events.index("rename")
    assert {file.name for file in path.iterdir()} <= set(events[:renamed])
    assert events[renamed + 1 :] == [tmp_path.name]


def test_no_pickle_is_executed(tmp_path: Path, content: Checkpoint) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'attacked'}",)

    path = save_checkpoint(tmp_path, 1, content)
    (path / "trained.safetensors").write_bytes(pickle.dumps(Attack()))
    assert find_fault(path) is not None
    with pytest.raises(Exception, match=r"(?i)header|deserializ"):
        load_checkpoint(path)
    assert not (tmp_path / "attacked").exists()


def test_states_of_methods_come_back_as_they_were() -> None:
    states = {"one": {"count": 3, "fisher/a": torch.arange(3.0)}, "two": {}, "three": {"names": ["x"]}}
    joined = join_states(*split_states(states))
    assert torch.equal(joined["one"].pop("fisher/a"), states["one"].pop("fisher/a"))
    assert joined == states
