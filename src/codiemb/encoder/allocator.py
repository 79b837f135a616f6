"""Keeps freed memory in the process, so that a step on the processor takes none anew. Imports no torch.

glibc gives large blocks back to the system when they are freed, and takes them again as pages of zeros, a page fault
each. A step frees and takes all its activations, so a good part of its time goes there. Kept memory is used again as
it is; the process then holds its peak until it ends. All threads share one pool of it: with one each, what a thread
frees no other could use.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # of glibc's malloc.h
_GROWTH = 64 << 20


def keep_memory() -> bool:
    """Makes malloc keep what is freed, for the whole process; False where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch looks at it when it first takes memory
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(option, value) == 1
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _GROWTH), (_M_ARENA_MAX, 1))
    )
