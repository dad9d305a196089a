"""What a pickle would import is named without importing it."""

import collections
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from llmbuilder.errors import LLMBuilderError
from llmbuilder.models.pickles import foreign_globals, load_tensors


class Calls:
    """Pickles into a call of each function that it is given."""

    def __init__(self, *functions: object) -> None:
        self.functions = functions

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return print, self.functions


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_foreign_name_is_found_in_every_protocol(tmp_path: Path, protocol: int) -> None:
    content = [Calls(os.getcwd, os.path.join), torch.float32, collections.OrderedDict(), Calls(os.getcwd)]
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(content, protocol))
    names = foreign_globals(tmp_path / "raw.pt")
    printer = "__builtin__.print" if protocol < 3 else "builtins.print"
    assert set(names) == {printer, "posix.getcwd", "posixpath.join"} and len(names) == 3


def test_names_are_found_in_both_of_torchs_formats(tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save({"w": torch.ones(3), "x": os.getcwd}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        assert foreign_globals(tmp_path / "x.pt") == ["posix.getcwd"]
        torch.save({"w": torch.ones(3)}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        assert foreign_globals(tmp_path / "x.pt") == []


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [b"", b"\x80", b"no pickle at all", b"\x80\x04\x95\xff\xff", b"PK\x03\x04"])
def test_garbage_names_nothing_and_loads_as_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    assert foreign_globals(tmp_path / "x.pt") == []
    with pytest.raises(LLMBuilderError, match=r"x\.pt is truncated or corrupt, or not a checkpoint.*again$") as error:
        load_tensors(tmp_path / "x.pt")
    assert "\n" not in str(error.value)


def test_a_zip_without_a_pickle_is_one_clear_error(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("readme", "hello")
    assert foreign_globals(tmp_path / "x.pt") == []
    with pytest.raises(LLMBuilderError, match="truncated or corrupt"):
        load_tensors(tmp_path / "x.pt")


def test_tensors_numbers_and_text_load(tmp_path: Path) -> None:
    content = {"w": torch.arange(3, dtype=torch.bfloat16), "n": 3, "f": 0.5, "s": "é", "l": [None, True]}
    torch.save(content, tmp_path / "x.pt")
    loaded = load_tensors(tmp_path / "x.pt")
    assert torch.equal(loaded.pop("w"), content.pop("w")) and loaded == content
