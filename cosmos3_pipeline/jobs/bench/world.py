"""The ranks of a benchmark: all of them, or the root alone while the others wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from cosmos3_pipeline.distributed.comm import Comm

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This rank's place. `comm` is over all ranks; `alone` a group of this rank only (None in a world of one)."""

    device: torch.device
    comm: Comm
    alone: ProcessGroup | None

    @classmethod
    def join(cls, device: torch.device) -> World:
        """Of an initialised `torch.distributed`, or of this process alone. All ranks call it together."""
        comm = Comm()
        groups = [dist.new_group([rank]) for rank in range(comm.size)] if comm.size > 1 else [None]
        return cls(device, comm, groups[comm.rank])

    @property
    def is_root(self) -> bool:
        return self.comm.is_root

    def wait(self) -> None:
        """Return when every rank has come here and its device has finished. Waiting takes no processor time."""
        self.finish()
        self.comm.agree(None)

    def finish(self) -> None:
        """Return when this rank's device has done what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, work: Callable[[], T]) -> tuple[T, float, float]:
        """The result of `work`, its seconds on the clock, and the processor's seconds of this rank."""
        self.wait()
        clock, processor = time.perf_counter(), time.process_time()
        result = work()
        self.finish()
        return result, time.perf_counter() - clock, time.process_time() - processor
