"""A tensor that the root fills and every rank then has: mapped, if it is large, by all of one machine, or sent."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cosmos3_pipeline.distributed.comm import Comm

# From how many bytes on it takes less to agree on a memory that all map than to send the tensor by gloo, and than
# to let each rank read it out of the root's memory. Pages that all can map come new from the system every time;
# what is smaller than 32 MiB is mostly taken from memory that a process has kept.
SHARED_BYTES = 1 << 20
SHARED_BYTES_IF_READABLE = 32 << 20

# Of <sys/mman.h>, from Linux 5.14 on: make pages that can be written.
_POPULATE_WRITE = 23

# Differs between machines, and from one start of a machine to the next.
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class RootTensor:
    """A tensor of `shape`, `like` another in dtype and device.

    The root writes into `tensor` (None on the other ranks); then `everywhere` gives it to every rank of `comm`.
    Where they are on one machine and on CPU, a large one is not copied: each maps the memory that the root has
    filled, copy on write, so that what a rank does to its tensor is its own affair.
    """

    def __init__(self, comm: Comm, shape: Sequence[int], *, like: Tensor) -> None:
        self._comm = comm
        self._like = like.new_empty(0)
        self._shape = torch.Size(shape)
        self._memory: _Memory | None = None
        self.tensor: Tensor | None = None
        if comm.is_root:
            if self._worth_sharing and (not comm.reads_memory or self._nbytes >= SHARED_BYTES_IF_READABLE):
                self._memory = _Memory.made(self._nbytes)
            if self._memory is None:
                self.tensor = like.new_empty(self._shape)
            else:
                self.tensor = self._mapped(self._memory.place, private=False)
                # Now, where the root of a line has nothing to do, not one by one while chunks are written.
                _make_pages(self.tensor)

    @property
    def _nbytes(self) -> int:
        return self._shape.numel() * self._like.element_size()

    @property
    def _worth_sharing(self) -> bool:
        return self._comm.size > 1 and self._like.device.type == "cpu" and self._nbytes >= SHARED_BYTES

    def everywhere(self) -> Tensor:
        """What the root has written, on every rank, all of which call this together. `tensor` is gone after it."""
        tensor, self.tensor = self.tensor, None
        if self._worth_sharing:
            place = self._comm.agree(None if self._memory is None else self._memory.place)[0]
            if place is not None and all(self._comm.agree(place.is_here)):
                tensor = None  # the root's own must not change what the others see either
                if self._comm.is_root:
                    self._comm.ledger.record("broadcast", self._nbytes)
                mapped = self._mapped(place, private=True)
                self._comm.agree(None)  # all have it, and the root may close the file
                self._memory = None
                return mapped
        if tensor is None:
            tensor = self._like.new_empty(self._shape)
        self._comm.broadcast(tensor)
        return tensor

    def _mapped(self, place: _Place, *, private: bool) -> Tensor:
        whole = torch.from_file(place.path, shared=not private, size=self._shape.numel(), dtype=self._like.dtype)
        return whole.view(self._shape)


@dataclass(frozen=True)
class _Place:
    """Where a memory can be found by other processes of its machine."""

    boot: str
    path: str
    device: int
    inode: int

    @property
    def is_here(self) -> bool:
        """Whether this process can map it. Another machine, or container, may have another file at that path."""
        if _boot() != self.boot or not os.access(self.path, os.R_OK):
            return False
        found = Path(self.path).stat()
        return (found.st_dev, found.st_ino) == (self.device, self.inode)


class _Memory:
    """Memory without a name in any folder. It is gone when it is closed and nobody maps it any more."""

    def __init__(self, number: int) -> None:
        weakref.finalize(self, os.close, number)
        about = os.fstat(number)
        self.place = _Place(_boot(), f"/proc/{os.getpid()}/fd/{number}", about.st_dev, about.st_ino)

    @classmethod
    def made(cls, nbytes: int) -> _Memory | None:
        """Of `nbytes`; None where the system has no such thing."""
        if not (hasattr(os, "memfd_create") and _BOOT.exists()):
            return None
        number = os.memfd_create("cosmos3")
        os.truncate(number, nbytes)
        return cls(number)


def _make_pages(tensor: Tensor) -> None:
    """Of a mapped tensor, all at once. Where the system cannot, each is made when it is first written."""
    libc = ctypes.CDLL(None)
    libc.madvise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), _POPULATE_WRITE)


def _boot() -> str:
    """Of the machine of this process."""
    return _BOOT.read_text() if _BOOT.exists() else ""
