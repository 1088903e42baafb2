"""Reading the memory of another process of this machine: one copy, made by whoever wants the data.

Linux has it as `process_vm_readv`. Whether it is allowed depends on the users of the two processes, on Yama and on
the container, so it is tried out before it is relied upon.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

# Of <sys/prctl.h>: who may read this process where Yama allows it to ancestors only, and what Yama calls itself.
_SET_PTRACER = 0x59616D61
_PROBE_BYTES = 16


@cache
def _probe(pid: int) -> Any:
    """A text that only process `pid`, which is this one, has; a fork of it makes its own."""
    return ctypes.create_string_buffer(os.urandom(_PROBE_BYTES), _PROBE_BYTES)


class _Extent(ctypes.Structure):
    """`struct iovec`."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@cache
def _libc() -> Any:
    """The C library, None where it cannot read other processes."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        read = libc.process_vm_readv
    except (OSError, AttributeError):
        return None
    extents = ctypes.POINTER(_Extent)
    read.restype = ctypes.c_ssize_t
    read.argtypes = [ctypes.c_int, extents, ctypes.c_ulong, extents, ctypes.c_ulong, ctypes.c_ulong]
    return libc


@dataclass(frozen=True)
class Process:
    """A process of this machine: its number, and where it has a text that no other has (`probe`, in hex)."""

    pid: int
    probe_address: int
    probe: str

    @classmethod
    def this(cls) -> Process:
        """This process, which its siblings may read from now on."""
        libc = _libc()
        if libc is not None and os.getppid() > 1:
            libc.prctl(_SET_PTRACER, ctypes.c_ulong(os.getppid()), 0, 0, 0)  # fails where there is no Yama
        probe = _probe(os.getpid())
        return cls(os.getpid(), ctypes.addressof(probe), probe.raw.hex())

    @property
    def is_readable(self) -> bool:
        """Whether this process may read the memory of that one."""
        if _libc() is None:
            return False
        found = ctypes.create_string_buffer(_PROBE_BYTES)
        try:
            self.read(self.probe_address, ctypes.addressof(found), _PROBE_BYTES)
        except RuntimeError:
            return False
        # Where containers share a folder, the number may be another process's.
        return found.raw.hex() == self.probe

    def read(self, address: int, place: int, nbytes: int) -> None:
        """Copy what that process has at `address` to `place` of this one. Raises RuntimeError where it may not."""
        done = 0
        while done < nbytes:
            here, there = _Extent(place + done, nbytes - done), _Extent(address + done, nbytes - done)
            count = _libc().process_vm_readv(self.pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
            if count <= 0:
                reason = os.strerror(ctypes.get_errno())
                raise RuntimeError(f"the memory of process {self.pid} cannot be read ({reason})")
            done += count
