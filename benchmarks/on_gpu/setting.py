"""The device of a step. Only this module knows whether it is a GPU, or a CPU in its place."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cosmos3_pipeline.distributed import comm
from cosmos3_pipeline.distributed.launch import joined_world
from cosmos3_pipeline.jobs.metrics import held_bytes, peak_bytes, reset_peak
from on_gpu.through_host import ThroughHost

MOST_RANKS = 8
# Ranks that share one GPU, so that strategies can be run with several ranks. A grid needs four.
SHARING_RANKS = 4


@dataclass(frozen=True)
class Setting:
    """The settings of every step. `device` is cuda or cpu, `small` takes sizes for a CPU, `file` gets the results.

    `topology` is the option of conf/topology with the accelerator for plans.
    """

    device: str
    small: bool
    file: str
    topology: str

    @property
    def gpus(self) -> int:
        """The number of GPUs that are used, a power of two. It is 0 on a CPU."""
        count = min(torch.cuda.device_count(), MOST_RANKS) if self.device == "cuda" else 0
        return 1 << (count.bit_length() - 1) if count else 0

    @property
    def shares(self) -> bool:
        """Whether ranks share a device. NCCL refuses two ranks on a GPU, so their messages go through the host."""
        return self.gpus < 2

    @property
    def ranks(self) -> int:
        """The number of ranks of a step that needs several."""
        if not self.shares:
            return self.gpus
        return SHARING_RANKS if self.device == "cuda" else 2

    @property
    def ranks_with_messages(self) -> int:
        """One rank for each GPU; a single rank sends to itself. On a CPU there are two ranks."""
        return self.gpus or 2

    @property
    def gpus_or_one(self) -> int:
        return self.gpus or 1

    @property
    def one(self) -> int:
        return 1

    @property
    def model(self) -> str:
        """The option of conf/model with the sizes of the models."""
        return "toy_random" if self.small else "nano"


@contextmanager
def on_rank(setting: Setting, *, shares: bool = False) -> Iterator[torch.device]:
    """Join the world of a step as one of its ranks, without gradients. Yields the device."""
    if shares:
        os.environ["LOCAL_RANK"] = "0"  # the GPU that all ranks share
    messages = patch.object(comm, "AcceleratorGroup", ThroughHost) if shares else nullcontext()
    with messages, joined_world(device=setting.device, threads=1) as device, torch.no_grad():
        yield device


def is_root() -> bool:
    """Whether this rank writes the results."""
    return os.environ.get("RANK", "0") == "0"


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Return the allocator's cached memory, so that other ranks on the device can use it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """The seconds of one call, until the device has finished."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def peak_of(run: Callable[[], object], device: torch.device) -> int:
    """The peak bytes of one call, beyond the bytes that are held before it."""
    reset_peak(device)
    before = held_bytes(device)
    run()
    synchronize(device)
    return peak_bytes(device) - before


@dataclass(frozen=True)
class Kernel:
    """A kernel: its name, how often it ran, and its total seconds."""

    name: str
    count: int
    seconds: float


def kernels_of(run: Callable[[], object], device: torch.device) -> list[Kernel]:
    """The kernels of one call with copies, the longest first. On a CPU they are ops."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        run()
        synchronize(device)
    wanted, time_us = DeviceType.CPU, "self_cpu_time_total"
    if on_gpu:
        wanted, time_us = DeviceType.CUDA, "self_device_time_total"
    found = [
        Kernel(str(event.key), event.count, getattr(event, time_us) / 1e6)
        for event in profiled.key_averages()
        if event.device_type == wanted
    ]
    return sorted(found, key=lambda kernel: -kernel.seconds)
