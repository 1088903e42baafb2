"""Messages between ranks on one machine, moved by the threads that wait for them.

gloo passes every message through threads of its own. On a machine whose cores all compute, those get their turn
late: a halo row took about 1.1 ms between two busy cores, and takes 0.1 ms in this way.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import tempfile
import time
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path

from torch import Tensor
from torch._C._distributed_c10d import Store
from torch.distributed.constants import default_pg_timeout

from cosmos3_pipeline.distributed.channel import SMALL_BYTES, Channel, Message
from cosmos3_pipeline.distributed.peer_memory import Process

# By which a connection begins: the rank, and the number among its connections.
_HELLO = struct.Struct("!II")

# So long a rank asks again and again before it sleeps: being woken takes a core that idles as long as a halo row's
# journey. Decoding 3 latent frames of 24 x 20 in two slabs takes 1% less time with it, of 9 x 8 3%.
_AWAKE_SECONDS = 100e-6


class Transfer:
    """Messages under way, and what moves them while somebody waits."""

    def __init__(self, links: LocalLinks) -> None:
        self._links = links
        self._messages: list[tuple[Message, Channel]] = []

    def send(self, message: Message, peer: int, lane: int) -> None:
        """Start sending; its tensor is not to be written until the transfer has been waited for."""
        channel = self._links.channels[peer, lane]
        self._messages.append((message, channel))
        channel.send(message)

    def receive(self, message: Message, peer: int, lane: int) -> None:
        """Start receiving."""
        channel = self._links.channels[peer, lane]
        self._messages.append((message, channel))
        channel.receive(message)

    def wait(self) -> None:
        """Return when all have left or arrived. Raises RuntimeError when they never will."""
        for message, channel in self._messages:
            if not message.done:
                channel.move()  # most have come by now: no need to ask what has
            while not message.done:
                self._links.move()


class LocalLinks:
    """Connections of one rank to those of its group that are on the same machine, `lanes` to each.

    Making one is collective over the ranks of `store`. In a lane between two ranks messages arrive in order; both
    must know their sizes. Whoever waits for one message moves all that can be moved. Errors are RuntimeErrors, as
    those of gloo.
    """

    def __init__(self, store: Store, rank: int, size: int, *, lanes: int) -> None:
        ends: dict[tuple[int, int], socket.socket] = {}  # by rank and number, two numbers a lane
        count = 2 * lanes
        with tempfile.TemporaryDirectory(prefix="cosmos3-") as folder, socket.socket(socket.AF_UNIX) as listener:
            address = _listening(listener, str(Path(folder) / "rank"), size * count)
            store.set(f"rank/{rank}", json.dumps([address, *astuple(Process.this())]))
            peers = {peer: json.loads(store.get(f"rank/{peer}")) for peer in range(size) if peer != rank}
            for lower in range(rank):
                links = _connected(peers[lower][0], rank, count)
                ends |= {(lower, number): link for number, link in enumerate(links)}
                store.set(f"link/{lower}-{rank}", "linked" if links else "apart")
            higher = [peer for peer in range(rank + 1, size) if store.get(f"link/{rank}-{peer}") == b"linked"]
            for _ in range(len(higher) * count):
                link, _address = listener.accept()
                ends[_HELLO.unpack(link.recv(_HELLO.size))] = link
        processes = {peer: Process(*peers[peer][1:]) for peer, number in ends if not number}
        self.channels = {
            (peer, lane): Channel(peer, process, ends[peer, 2 * lane], ends[peer, 2 * lane + 1])
            for peer, process in processes.items()
            for lane in range(lanes)
        }
        # The ranks that can read the memory of this one and whose memory this one can read.
        self.readable = self._readable_both_ways(store, rank, processes)

    @staticmethod
    def _readable_both_ways(store: Store, rank: int, processes: Mapping[int, Process]) -> set[int]:
        for peer, process in processes.items():
            store.set(f"reads/{rank}-{peer}", str(process.is_readable))
        both = str(True).encode()
        return {
            peer
            for peer in processes
            if store.get(f"reads/{rank}-{peer}") == both == store.get(f"reads/{peer}-{rank}")
        }

    def carries(self, tensor: Tensor, peer: int) -> bool:
        """Whether messages like `tensor` to and from `peer` go this way; the same on both sides."""
        if (peer, 0) not in self.channels or not tensor.nbytes:
            return False
        return tensor.nbytes <= SMALL_BYTES or peer in self.readable

    def move(self) -> None:
        """Wait until something can be moved, and move it."""
        ready, waiting = select.poll(), {}
        for channel in self.channels.values():
            for number, events in channel.awaited():
                ready.register(number, events)
                waiting[number] = channel
        if not waiting:
            raise RuntimeError("the connections to the other ranks of this machine were closed")
        seconds = default_pg_timeout.total_seconds()
        found, until = ready.poll(0), time.perf_counter() + _AWAKE_SECONDS
        while not found and time.perf_counter() < until:
            os.sched_yield()  # where ranks share a core, to the one that is waited for
            found = ready.poll(0)
        found = found or ready.poll(1000 * seconds)
        if not found:
            peers = sorted({channel.peer for channel in waiting.values()})
            raise RuntimeError(f"no message from ranks {peers} within {seconds:.0f} s")
        for number, _ in found:
            waiting[number].move()

    def close(self) -> None:
        """Close the connections, which ends the waiting of every rank that waits for this one."""
        for channel in self.channels.values():
            channel.close()
        self.channels.clear()


def _listening(listener: socket.socket, address: str, size: int) -> str:
    """Where the listener is; nowhere, if the folder for temporary files has too long a name for a socket."""
    try:
        listener.bind(address)
    except OSError:
        return ""
    listener.listen(size)
    return address


def _connected(address: str, rank: int, count: int) -> list[socket.socket]:
    """`count` connections to the listener at `address`, each told `rank`; none if that is on another machine."""
    ends = [socket.socket(socket.AF_UNIX) for _ in range(count)]
    for number, end in enumerate(ends):
        try:
            end.connect(address)
        except OSError:
            for unused in ends:
                unused.close()
            if number:
                raise
            return []
        end.sendall(_HELLO.pack(rank, number))
    return ends
