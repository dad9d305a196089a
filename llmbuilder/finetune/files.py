"""Files that are there whole or not at all."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import LLMBuilderError
from ..models import replacing


@contextmanager
def saving(path: Path) -> Iterator[Path]:
    """``models.replacing``: what the block writes under the name it is given takes its place at ``path``.

    Raises:
        LLMBuilderError: the disk is full or refuses; what was there before is as it was.
    """
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see that it can be written"
        raise LLMBuilderError(f"{path}: cannot be saved ({error.strerror}); {advice}, then resume the run") from error


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
