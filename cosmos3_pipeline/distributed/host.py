"""Host memory in bytes: resident now, resident at most, and still available."""

from __future__ import annotations

import os
import platform
import resource
from contextlib import suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_MEMINFO = Path("/proc/meminfo")
# (limit, use) of the control group that a container runs in: cgroup version 2, then version 1.
_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def reset_peak() -> None:
    """Forget the peak so far, if the system can: on Linux, the kernel resets VmHWM on request.

    On other systems, and in a container with a read-only /proc, the peak stays that of the whole process.
    """
    with suppress(OSError):
        _RESET.write_text("5")


def peak_bytes() -> int:
    """The peak of resident bytes since the last `reset_peak`."""
    if (found := _status("VmHWM")) is not None:
        return found
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if platform.system() == "Darwin" else kilobytes * 1024


def resident_bytes() -> int:
    """The bytes that are resident now; on systems other than Linux, the peak of resident bytes."""
    found = _status("VmRSS")
    return peak_bytes() if found is None else found


def available_bytes() -> int:
    """The bytes that new processes can still take on this machine or in this container."""
    free = _kilobytes(_MEMINFO, "MemAvailable")
    rooms = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if free is None else free]
    for limit, use in _GROUPS:
        with suppress(OSError, ValueError):  # no such file, no permission, or the limit is "max"
            rooms.append(int(limit.read_text()) - int(use.read_text()))
    return min(rooms)


def _status(name: str) -> int | None:
    return _kilobytes(_STATUS, name)


def _kilobytes(file: Path, name: str) -> int | None:
    """The value in bytes of line `name` of `file`; None if the file or line is missing or cannot be read."""
    with suppress(OSError):
        for line in file.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
