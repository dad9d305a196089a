"""Ctrl-C outside the training loop, which listens for itself."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..finetune.interrupt import interruptible


@contextmanager
def heard() -> Iterator[None]:
    """Raise KeyboardInterrupt at the end where Ctrl-C was pressed inside, and a destructor dropped it or a library made
    another error of it."""
    with interruptible() as check:
        try:
            yield
        except Exception:
            check()
            raise
        check()
