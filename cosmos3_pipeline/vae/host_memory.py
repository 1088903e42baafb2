"""What the C library does with memory that a rank on CPU no longer uses: kept for the next op, not given back.

Memory that comes new from the system is mapped page by page while it is first written, which may take as long as
computing what is written. The executor frees and takes buffers of the same sizes all the time. By default glibc
gives large ones back at once; without that, decoding 8 latent frames of 24 x 20 at the toy model's width took 6%
less time, and no more memory. For an accelerator PyTorch's own allocator keeps what was freed.
"""

from __future__ import annotations

import ctypes
import os

# Of <malloc.h>. The largest size that glibc accepts for what it keeps, and the largest int.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT_BYTES = 32 << 20
_MOST_KEPT_BYTES = (1 << 31) - 1

# Whoever sets one of these has decided for themselves.
SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """From now on this process keeps freed buffers of up to 32 MiB each, 2 GiB in all, for its next ones.

    Does nothing where the C library is not glibc or the environment has one of `SETTINGS`. Returns whether it did.
    """
    if any(name in os.environ for name in SETTINGS) or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return False
    libc = ctypes.CDLL(None)
    return bool(
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES) and libc.mallopt(_TRIM_THRESHOLD, _MOST_KEPT_BYTES)
    )
