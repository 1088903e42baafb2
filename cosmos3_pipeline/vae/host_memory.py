"""Lets the C library keep the freed memory of a CPU rank for the next op, instead of returning it to the system.

Ops free and allocate buffers of the same sizes all the time. glibc by default returns large buffers to the system
at once. The system then maps new memory page by page at the first write, which may take as long as computing the
values. On an accelerator PyTorch's own allocator keeps freed memory.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Lock

# Option numbers of <malloc.h>; then glibc's largest threshold, the largest int, and glibc's default of M_MMAP_MAX.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_MAPPED_BYTES = 32 << 20
_MOST_KEPT_BYTES = (1 << 31) - 1
_MAPPED_BUFFERS = 65536

# A user who sets one of these variables has chosen the allocator's settings, so they are not changed.
SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")

# The C library, once it keeps freed buffers. The number of open blocks of each kind, over all threads.
_keeping: ctypes.CDLL | None = None
_open = {"large": 0, "long-lived": 0}
_lock = Lock()


def keep_freed_memory() -> bool:
    """Let this process keep freed buffers of up to 32 MiB each for later buffers, up to 2 GiB in total.

    Does nothing if the C library is not glibc, or the environment has one of `SETTINGS`. Returns whether freed
    buffers are kept.
    """
    global _keeping
    if any(name in os.environ for name in SETTINGS) or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return False
    libc = ctypes.CDLL(None)
    options = {_MMAP_THRESHOLD: _MAPPED_BYTES, _TRIM_THRESHOLD: _MOST_KEPT_BYTES}
    if all(libc.mallopt(option, value) for option, value in options.items()):
        _keeping = libc
    return _keeping is not None


@contextmanager
def _block(kind: str) -> Iterator[None]:
    if _keeping is None:
        yield
        return
    _count(_keeping, kind, 1)
    try:
        yield
    finally:
        _count(_keeping, kind, -1)


def _count(libc: ctypes.CDLL, kind: str, by: int) -> None:
    """Count open blocks. Buffers over 32 MiB are mapped one by one, unless a block keeps large buffers."""
    with _lock:
        _open[kind] += by
        kept = _open["large"] and not _open["long-lived"]
        libc.mallopt(_MMAP_MAX, 0 if kept else _MAPPED_BUFFERS)


def keeping_large_buffers() -> AbstractContextManager[None]:
    """Keep buffers of any size that are allocated in the block, if this process keeps freed memory.

    Used for ops: decoding 3 latent frames of 72 x 60 at the toy's width took 17% less time and 10% more resident
    memory. Not used outside of ops, because a kept buffer may be a hole that no later buffer fits in.
    """
    return _block("large")


def long_lived() -> AbstractContextManager[None]:
    """Return buffers of the block to the system when they are freed, although the process keeps other buffers.

    This applies to buffers of 32 MiB and more that fit into no freed buffer. Used for weights, because a kept
    buffer of their size would be a hole.
    """
    return _block("long-lived")
