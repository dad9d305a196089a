"""Keep freed memory in the process: page faults on memory that was given back slow every training step down."""

import ctypes
import sys

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1  # bytes; mallopt takes an int


def keep_freed_memory() -> bool:
    """Tell glibc's malloc not to return freed blocks to the system, for the life of this process.

    Only the command line does this, in its own process; the library leaves its host's malloc alone. Returns whether it
    took effect: never outside Linux, nor with another C library or a malloc put in its place.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _NEVER)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
