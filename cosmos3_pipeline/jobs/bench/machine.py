"""What a benchmark ran on: numbers without it say nothing."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cosmos3_pipeline.jobs.metrics import versions

OPTIONAL = ("distvae", "matplotlib")


@contextmanager
def pinned(threads: int) -> Iterator[list[int]]:
    """Keep this process to `threads` cores of its own, counted off by the ranks of this machine.

    Ranks that exchange messages are otherwise woken on each other's cores and take turns: on two cores that made
    two ranks slower than one. Yields the cores; none where the ranks of this machine want more than it has, or
    where the system cannot do it.
    """
    local, ranks = (
        int(os.environ.get(key, default)) for key, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    if not hasattr(os, "sched_setaffinity") or threads == 0:
        yield []
        return
    before = os.sched_getaffinity(0)
    own = sorted(before)[local * threads : (local + 1) * threads] if ranks * threads <= len(before) else []
    if own:
        os.sched_setaffinity(0, own)
    try:
        yield own
    finally:
        os.sched_setaffinity(0, before)


def machine(device: torch.device, threads: int, cores: list[list[int]], reads: list[bool]) -> dict[str, Any]:
    """Processor, memory, versions, threads and own cores of each rank, and the load of the last minute before.

    `reads`: which ranks read large messages out of their senders' memory.
    """
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "threads_per_rank": threads,
        "pinned_to": cores,
        "reads_memory": reads,
        "load_before": os.getloadavg()[0],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "versions": {**versions(), **{name: _installed(name) for name in OPTIONAL}},
    }


def _processor() -> str:
    """Its name; on Linux as the kernel has it."""
    about = Path("/proc/cpuinfo")
    if about.exists():
        named = (line.partition(":")[2].strip() for line in about.read_text().splitlines() if "model name" in line)
        return next(named, platform.machine())
    return platform.processor() or platform.machine()


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
