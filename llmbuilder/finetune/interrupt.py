"""Ctrl-C that is not lost."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Inside, the call that it gives raises KeyboardInterrupt where Ctrl-C was pressed and nobody heard of it; so does
    its end.

    Python raises KeyboardInterrupt wherever the main thread is just then; in a destructor or in a callback of the
    garbage collector it is printed and dropped, and the run would go on; a library may make another error of it. A
    program's own handler stays as it is.
    """
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, press)
    try:
        yield check
        check()
    except Exception:
        check()
        raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
