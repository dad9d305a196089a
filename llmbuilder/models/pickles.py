"""Reading tensors out of pickle files without running anything that a file holds."""

import io
import logging
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import LLMBuilderError

logger = logging.getLogger(__name__)


def load_tensors(path: Path) -> Any:
    """What ``torch.save`` wrote, as long as it is made of tensors, numbers, strings and containers.

    Raises:
        LLMBuilderError: the file asks for anything else (it is named, and not run), or is truncated or corrupt.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise refusal(path, error) from error
    except Exception as error:  # a damaged file fails in any of a dozen ways: zip, pickle, struct, unicode ...
        raise LLMBuilderError(
            f"{path} is truncated or corrupt, or not a checkpoint ({_first_line(error)}); save or download it again"
        ) from error


def refusal(path: Path, error: Exception) -> LLMBuilderError:
    """Why torch's restricted unpickler refused ``path``, with the name of what the file wanted to call."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    wanted = [named[1]] if named else foreign_globals(path)
    if wanted:
        return LLMBuilderError(
            f"{path} was refused and nothing in it was run: its pickle asks for {', '.join(wanted)}, and a model file "
            "may hold tensors, numbers and text only. Don't trust the file; get the model as safetensors"
        )
    return LLMBuilderError(f"{path} is truncated or corrupt, or not a checkpoint; save or download it again")


def foreign_globals(path: Path) -> list[str]:
    """Names outside torch and collections that the file's pickles would import, found by reading their opcodes."""
    found: dict[str, None] = {}
    try:
        stream = io.BytesIO(_pickle_bytes(path))
        while True:  # the older format is several pickles in a row, then bare numbers
            for name in _globals(stream):
                found[name] = None
    except Exception as end:  # pickletools raises anything at all where the pickles end or are damaged
        logger.debug("%s: no more names: %s", path, end)
    return [name for name in found if name.split(".")[0] not in ("torch", "collections")]


def _pickle_bytes(path: Path) -> bytes:
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def _globals(stream: io.BytesIO) -> Iterator[str]:
    """Every global that one pickle names: GLOBAL holds its name, STACK_GLOBAL takes the two strings pushed last."""
    memo: dict[int, Any] = {}
    strings: list[str] = []
    pushed: Any = None
    argument: Any
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            yield argument.replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = pushed
        elif "PUT" in opcode.name:
            memo[argument] = pushed
        else:
            pushed = memo.get(argument) if "GET" in opcode.name else argument
            if isinstance(pushed, str):
                strings.append(pushed)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
