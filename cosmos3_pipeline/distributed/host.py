"""How much memory this process has on the host, had at most, and could still get."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
# Limit and use of the control group that a container runs in: of version 2, then of version 1.
_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def reset_peak() -> None:
    """Forget the peak so far. On Linux the kernel resets VmHWM on request; elsewhere the peak is the process's."""
    if _RESET.exists():
        _RESET.write_text("5")


def peak_bytes() -> int:
    """The most bytes that were resident since the last `reset_peak`."""
    if _STATUS.exists():
        return _status("VmHWM")
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if platform.system() == "Darwin" else kilobytes * 1024


def resident_bytes() -> int:
    """The bytes that are resident now; elsewhere than on Linux the most that ever were."""
    return _status("VmRSS") if _STATUS.exists() else peak_bytes()


def available_bytes() -> int:
    """The bytes that new processes could take before the machine, or the container, has none left."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = int(
        next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable")).split()[1]
    )
    rooms = [free * 1024]
    for limit, use in _GROUPS:
        if limit.exists() and limit.read_text().strip().isdigit():
            rooms.append(int(limit.read_text()) - int(use.read_text()))
    return min(rooms)


def _status(name: str) -> int:
    return _kilobytes(_STATUS, name) * 1024


def _kilobytes(file: Path, name: str) -> int:
    line = next(line for line in file.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])
