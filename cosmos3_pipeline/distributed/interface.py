"""The network interface for messages between machines: the interface that leads to the shared store.

Without this choice, gloo uses the interface of the machine's host name, and NCCL the first interface that it
finds. Other machines may not be able to reach either of them.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import MutableMapping
from contextlib import suppress

_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def use_interface_of_store(environ: MutableMapping[str, str]) -> None:
    """On several machines, set the interface to MASTER_ADDR for gloo and NCCL, unless `environ` has a choice."""
    ranks, here = (int(environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if ranks <= here:
        return
    interface = _interface_to(environ.get("MASTER_ADDR", ""))
    if interface is not None:
        for variable in _VARIABLES:
            environ.setdefault(variable, interface)


def _interface_to(host: str) -> str | None:
    """The interface from which `host` is reached; None if it is unknown or `host` is this machine (127.*)."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        end.connect((host, 1))  # sends nothing
        own: str = end.getsockname()[0]
        if own.startswith("127."):
            return None
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                request = struct.pack("256s", name.encode()[:15])
                if socket.inet_ntoa(fcntl.ioctl(end.fileno(), _SIOCGIFADDR, request)[20:24]) == own:
                    return name
    return None
