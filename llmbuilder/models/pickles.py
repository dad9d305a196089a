"""Reading tensors out of pickle files without running anything that a file holds."""

import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..errors import LLMBuilderError


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
    """Names outside torch and collections that the file's pickle would import, found by reading its opcodes."""
    try:
        names = _globals(_pickle_bytes(path))
    except Exception:  # pickletools raises anything on garbage; then there is nothing to name
        return []
    return [name for name in names if name.split(".")[0] not in ("torch", "collections")]


def _pickle_bytes(path: Path) -> bytes:
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def _globals(data: bytes) -> list[str]:
    """Every global that a pickle names: GLOBAL holds its name, STACK_GLOBAL takes the two strings pushed last."""
    found: dict[str, None] = {}
    memo: dict[int, Any] = {}
    strings: list[str] = []
    pushed: Any = None
    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("GLOBAL", "INST"):
            found[argument.replace(" ", ".")] = None
        elif opcode.name == "STACK_GLOBAL":
            found[".".join(strings[-2:])] = None
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = pushed
        elif "PUT" in opcode.name:
            memo[int(argument)] = pushed
        elif "GET" in opcode.name:
            argument = memo.get(int(argument))
        if opcode.name not in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            pushed = argument
            if isinstance(argument, str):
                strings.append(argument)
    return list(found)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
