"""Small messages between ranks on one machine, over Unix sockets, moved by the thread that waits for them.

gloo passes every message through threads of its own. On a machine whose cores all compute, those get their turn
late: a halo row took about 1.1 ms between two busy cores, and takes 0.1 ms in this way. Large messages stay with
gloo, whose threads move them while the ranks compute.
"""

from __future__ import annotations

import select
import socket
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store
from torch.distributed.constants import default_pg_timeout

# What a socket's buffer takes at once, so that a message leaves without its receiver's help.
SMALL_BYTES = 192 << 10


class Transfer:
    """One message under way."""

    def __init__(self, links: LocalLinks, tensor: Tensor) -> None:
        self._links = links
        # Bytes, because NumPy knows no bfloat16.
        data: Any = tensor.view(-1).view(torch.uint8).numpy()
        self.rest = memoryview(data)

    def wait(self) -> None:
        """Return when it has left or arrived. Raises RuntimeError when it never will."""
        while self.rest:
            self._links.move()


class LocalLinks:
    """Connections of one rank to those of its group that are on the same machine.

    Making one is collective over the ranks of `store`. Between two ranks messages arrive in order; sender and
    receiver must know their sizes. Errors are RuntimeErrors, as those of gloo.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._sockets: dict[int, socket.socket] = {}
        self._sending: dict[int, deque[Transfer]] = {}
        self._receiving: dict[int, deque[Transfer]] = {}
        with tempfile.TemporaryDirectory(prefix="cosmos3-") as folder, socket.socket(socket.AF_UNIX) as listener:
            store.set(f"local/{rank}", _listening(listener, str(Path(folder) / "rank"), size))
            for lower in range(rank):
                link = _connected(store.get(f"local/{lower}").decode(), rank)
                store.set(f"local/{lower}-{rank}", "linked" if link else "apart")
                if link:
                    self._add(lower, link)
            higher = [r for r in range(rank + 1, size) if store.get(f"local/{rank}-{r}") == b"linked"]
            for _ in higher:
                link, _address = listener.accept()
                self._add(int.from_bytes(link.recv(4)), link)

    def _add(self, peer: int, link: socket.socket) -> None:
        link.setblocking(False)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * SMALL_BYTES)
        self._sockets[peer] = link
        self._sending[peer], self._receiving[peer] = deque(), deque()

    def carries(self, tensor: Tensor, peer: int) -> bool:
        """Whether messages like `tensor` to and from `peer` go this way; the same on both sides."""
        return peer in self._sockets and 0 < tensor.nbytes <= SMALL_BYTES

    def send(self, tensor: Tensor, peer: int) -> Transfer:
        """Start sending a contiguous `tensor`, not to be written until the transfer has been waited for."""
        transfer = Transfer(self, tensor)
        self._sending[peer].append(transfer)
        self._write(peer)
        return transfer

    def receive(self, tensor: Tensor, peer: int) -> Transfer:
        """Start receiving into a contiguous `tensor`."""
        transfer = Transfer(self, tensor)
        self._receiving[peer].append(transfer)
        return transfer

    def move(self) -> None:
        """Wait until something can be moved, and move it."""
        ready, peers = select.poll(), {}
        for peer, link in self._sockets.items():
            wanted = select.POLLIN * bool(self._receiving[peer]) | select.POLLOUT * bool(self._sending[peer])
            if wanted:
                ready.register(link, wanted)
                peers[link.fileno()] = peer
        if not peers:
            raise RuntimeError("the connections to the other ranks of this machine were closed")
        seconds = default_pg_timeout.total_seconds()
        events = ready.poll(1000 * seconds)
        if not events:
            raise RuntimeError(f"no message from ranks {sorted(peers.values())} within {seconds:.0f} s")
        for number, _ in events:
            # Both are tried, and do nothing where there is nothing to do; a broken connection fails in either.
            self._write(peers[number])
            self._read(peers[number])

    def close(self) -> None:
        """Close the connections, which ends the waiting of every rank that waits for this one."""
        for link in self._sockets.values():
            link.close()
        self._sockets.clear()

    def _write(self, peer: int) -> None:
        queue = self._sending[peer]
        while queue:
            try:
                sent = self._sockets[peer].send(queue[0].rest)
            except BlockingIOError:
                return
            except OSError as error:
                raise RuntimeError(f"the connection to rank {peer} is closed ({error})") from error
            queue[0].rest = queue[0].rest[sent:]
            if not queue[0].rest:
                queue.popleft()

    def _read(self, peer: int) -> None:
        queue = self._receiving[peer]
        while queue:
            try:
                taken = self._sockets[peer].recv_into(queue[0].rest)
            except BlockingIOError:
                return
            except OSError as error:
                raise RuntimeError(f"the connection to rank {peer} is closed ({error})") from error
            if not taken:
                raise RuntimeError(f"rank {peer} has closed its connection")
            queue[0].rest = queue[0].rest[taken:]
            if not queue[0].rest:
                queue.popleft()


def _listening(listener: socket.socket, address: str, size: int) -> str:
    """Where the listener is; nowhere, if the folder for temporary files has too long a name for a socket."""
    try:
        listener.bind(address)
    except OSError:
        return ""
    listener.listen(size)
    return address


def _connected(address: str, rank: int) -> socket.socket | None:
    """A connection to the listener at `address`, which is told `rank`; None when that is on another machine."""
    link = socket.socket(socket.AF_UNIX)
    try:
        link.connect(address)
    except OSError:
        link.close()
        return None
    link.sendall(rank.to_bytes(4))
    return link
