"""Which network the ranks of several machines talk through: the one that leads to the store that they share.

gloo would take the interface of the machine's own name, which may be one that the other machines do not reach, and
NCCL the first that it finds.
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
    """Tell gloo and NCCL, where a person has not, the interface that leads to MASTER_ADDR, on several machines."""
    ranks, here = (int(environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if ranks <= here:
        return
    interface = _interface_to(environ.get("MASTER_ADDR", ""))
    if interface is not None:
        for variable in _VARIABLES:
            environ.setdefault(variable, interface)


def _interface_to(host: str) -> str | None:
    """The interface from which `host` is reached; None where that is unknown, or is this machine by a name."""
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
