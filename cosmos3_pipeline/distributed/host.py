"""How much memory this process has on the host, had at most, and could still get."""

from __future__ import annotations

import os
import platform
import resource
from contextlib import suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_MEMINFO = Path("/proc/meminfo")
# Limit and use of the control group that a container runs in: of version 2, then of version 1.
_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def reset_peak() -> None:
    """Forget the peak so far. On Linux the kernel resets VmHWM on request; elsewhere the peak is the process's.

    A container may have a /proc that is read-only, and then it is the process's too.
    """
    with suppress(OSError):
        _RESET.write_text("5")


def peak_bytes() -> int:
    """The most bytes that were resident since the last `reset_peak`."""
    if (found := _status("VmHWM")) is not None:
        return found
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if platform.system() == "Darwin" else kilobytes * 1024


def resident_bytes() -> int:
    """The bytes that are resident now; elsewhere than on Linux the most that ever were."""
    found = _status("VmRSS")
    return peak_bytes() if found is None else found


def available_bytes() -> int:
    """The bytes that new processes could take before the machine, or the container, has none left."""
    free = _kilobytes(_MEMINFO, "MemAvailable")
    rooms = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if free is None else free]
    for limit, use in _GROUPS:
        with suppress(OSError, ValueError):  # there is none, it is not for us to read, or it is "max"
            rooms.append(int(limit.read_text()) - int(use.read_text()))
    return min(rooms)


def _status(name: str) -> int | None:
    return _kilobytes(_STATUS, name)


def _kilobytes(file: Path, name: str) -> int | None:
    """The bytes that a line of `file` says; None where there is no such file or line, or it cannot be read."""
    with suppress(OSError):
        for line in file.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
