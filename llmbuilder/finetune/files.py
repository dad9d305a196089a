"""Files that are there whole or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import LLMBuilderError
from ..models import replacing


@contextmanager
def saving(path: Path) -> Iterator[Path]:
    """``models.replacing``: what the block writes under the name it is given takes its place at ``path``.

    Raises LLMBuilderError as ``explained``; what was there before is as it was.
    """
    with explained(path), replacing(path) as temporary:
        yield temporary


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Around what writes at ``path``: raises LLMBuilderError where the disk is full or refuses."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
        full = number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in reason
        advice = "free some space" if full else "see that it can be written"
        raise LLMBuilderError(f"{path}: cannot be saved ({reason}); {advice}, then resume the run") from error


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    with saving(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file or a folder with all that it holds, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what saves under a name, or under any, left in a folder when a crash cut them short."""
    for pattern in (f".{name}.*.new", f".{name}.*.old"):
        for leftover in folder.glob(pattern):
            remove(leftover)
