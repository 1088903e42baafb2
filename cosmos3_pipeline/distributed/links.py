"""Messages on CPU between ranks of one machine, moved by the threads that wait for them.

gloo moves every message in extra threads, which are scheduled late on a machine whose cores all compute. A halo
row between two busy cores took about 1.1 ms with gloo, and takes 0.1 ms with this module.

A small message is sent through a Unix socket, a large message through shared memory. The sender copies a piece of
the message into a free slot, and sends the slot's number through the socket. The receiver copies the piece out,
and returns the number. While slots are free the sender does not wait. It can compute the next chunk before the
receiver asks for this chunk.
"""

from __future__ import annotations

import ctypes
import heapq
import mmap
import os
import select
import socket
import struct
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

from torch import Tensor
from torch._C._distributed_c10d import Store

from cosmos3_pipeline import stopping
from cosmos3_pipeline.distributed.machine import can_wait

# A socket's buffer takes this many bytes at once, so a small message leaves before its receiver is ready.
SMALL_BYTES = 192 << 10
# A piece of this size stays in a core's cache. Sender and receiver copy different pieces of a message
# concurrently.
SLOT_BYTES = 512 << 10
SLOTS = 256  # in each direction between two ranks; a slot's number is sent as one byte

# A rank polls its sockets for this long before it sleeps, because waking an idle core takes as long as sending a
# halo row. With polling, decoding 3 latent frames in two slabs takes 1% less time at 24 x 20, and 3% less at 9 x
# 8.
_AWAKE_SECONDS = 100e-6

_HELLO = struct.Struct("!I")  # the rank that connects

A = TypeVar("A")
T = TypeVar("T")


class Message:
    """A contiguous tensor in flight. `rest` is the memory that has not left yet, or not arrived yet."""

    def __init__(self, tensor: Tensor, link: Link, links: Links) -> None:
        self._tensor = tensor  # keeps the memory of `rest` alive
        self._link, self._links = link, links
        self.is_small = tensor.nbytes <= SMALL_BYTES
        self.rest = memoryview(b"")
        if tensor.nbytes:
            self.rest = memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")

    def wait(self) -> None:
        """Return when the message has left or arrived. Raises RuntimeError if it never can."""
        if self.rest:
            self._link.move()  # most messages are complete after this, so that no poll is needed
        while self.rest:
            self._links.move()


class Lane(NamedTuple):
    """A socket, and the queues of messages that wait to be sent and to be received through it."""

    end: socket.socket
    leaving: deque[Message]
    arriving: deque[Message]


class Link:
    """The connection of this rank to `peer` on the same machine: lanes, and shared memory slots for all lanes.

    `ends` are sockets: the first returns slot numbers, the others are one per lane. `file` is the shared memory;
    it is mapped and then closed. The first half of its slots belongs to the rank with `is_first`. No method
    blocks.
    """

    def __init__(self, peer: int, ends: list[socket.socket], file: int, *, is_first: bool) -> None:
        self.peer = peer
        self.returns = ends[0]
        self.lanes = [Lane(end, deque(), deque()) for end in ends[1:]]
        for end in ends:
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * SMALL_BYTES)
        memory = memoryview(mmap.mmap(file, 0))
        os.close(file)
        halves = memory[: len(memory) // 2], memory[len(memory) // 2 :]
        self._own, self._peers = halves if is_first else reversed(halves)
        # A heap, so that the lowest free slot is used first: the system allocates memory only for used slots, and
        # a slot that was used before may still be in a cache.
        self._free = list(range(len(self._own) // SLOT_BYTES))
        self._owed = bytearray()  # numbers of the peer's slots that were read and not yet returned

    def move(self) -> None:
        """Move all bytes that can be moved now. Raises RuntimeError if the connection is broken."""
        try:
            for end, leaving, arriving in self.lanes:
                while leaving and _advanced(leaving, self._send(leaving[0], end)):
                    pass
                while arriving and _advanced(arriving, self._receive(arriving[0], end)):
                    pass
        except OSError as error:
            raise RuntimeError(f"the connection to rank {self.peer} is closed ({error})") from error
        if self._owed:
            self._give_back()

    def _send(self, message: Message, end: socket.socket) -> int:
        """Send what the socket takes, or one piece through a slot; returns the number of bytes sent."""
        if message.is_small:
            return _tried(end.send, message.rest) or 0
        for number in _tried(self.returns.recv, SLOTS) or b"":
            heapq.heappush(self._free, number)
        if not self._free:
            return 0
        piece, start = message.rest[:SLOT_BYTES], self._free[0] * SLOT_BYTES
        self._own[start : start + len(piece)] = piece
        if not _tried(end.send, bytes(self._free[:1])):
            return 0
        heapq.heappop(self._free)
        return len(piece)

    def _receive(self, message: Message, end: socket.socket) -> int:
        """Receive what the socket has, or one piece from a slot; returns the number of bytes received."""
        if message.is_small:
            return _tried(end.recv_into, message.rest) or 0
        number = _tried(end.recv, 1)
        if not number:
            return 0
        piece, start = message.rest[:SLOT_BYTES], number[0] * SLOT_BYTES
        piece[:] = self._peers[start : start + len(piece)]
        self._owed += number
        self._give_back()
        return len(piece)

    def _give_back(self) -> None:
        try:
            del self._owed[: _tried(self.returns.send, bytes(self._owed)) or 0]
        except OSError:  # a peer that has left after its last message needs no slots back
            self._owed.clear()

    def awaited(self) -> Iterator[tuple[socket.socket, bool, bool]]:
        """(socket, whether to wait until it is readable, whether to wait until it is writable)."""
        lacks_slot = False
        for end, leaving, arriving in self.lanes:
            is_stuck = bool(leaving) and not leaving[0].is_small and not self._free
            lacks_slot |= is_stuck
            yield end, bool(arriving), bool(leaving) and not is_stuck
        yield self.returns, lacks_slot, bool(self._owed)

    def close(self) -> None:
        for end, leaving, arriving in (*self.lanes, Lane(self.returns, deque(), deque())):
            leaving.clear()
            arriving.clear()
            with suppress(OSError):  # the peer has closed it already
                end.shutdown(socket.SHUT_RDWR)  # close() alone has no effect while a forked process has the socket
            end.close()
        for half in (self._own, self._peers):
            half.release()


class Links:
    """Links of one rank to the ranks of its group that are on the same machine, each with `lanes` lanes.

    The constructor is collective over the ranks of `store`. Both ends must know the size of a message. A rank that
    waits for one message moves all messages that can be moved. It gives up if nothing could be moved for
    `patience` seconds. Errors are RuntimeErrors, like gloo's.
    """

    # The folder for files that exist only while links are made; None is the system's folder for temporary files.
    folder: ClassVar[str | None] = None

    def __init__(self, store: Store, rank: int, size: int, *, lanes: int, patience: float) -> None:
        self._links = dict[int, Link]()
        self._patience = patience
        with (
            tempfile.TemporaryDirectory(prefix="cosmos3-", dir=self.folder) as folder,
            stopping.leftover(Path(folder)),
            socket.socket(socket.AF_UNIX) as listener,
        ):
            here = can_wait()
            address = _listening(listener, str(Path(folder) / "rank"), size) if here else ""
            store.set(f"address/{rank}", address)
            for peer in range(rank):
                theirs = store.get(f"address/{peer}").decode()
                link = _connected(theirs, rank, peer, lanes) if here and theirs else None
                store.set(f"link/{peer}-{rank}", "linked" if link else "apart")
                if link is not None:
                    self._links[peer] = link
            for _ in [p for p in range(rank + 1, size) if store.get(f"link/{rank}-{p}") == b"linked"]:
                link = _accepted(listener, lanes)
                self._links[link.peer] = link

    def __contains__(self, peer: int) -> bool:
        """Whether messages to and from `peer` use a link; both ranks get the same answer."""
        return peer in self._links

    def __len__(self) -> int:
        return len(self._links)

    def send(self, tensor: Tensor, peer: int, lane: int) -> Message:
        """Start sending a contiguous tensor. It must not be written before `wait` of the message has returned."""
        link = self._links[peer]
        message = Message(tensor, link, self)
        if message.rest:
            link.lanes[lane].leaving.append(message)
            link.move()
        return message

    def receive(self, tensor: Tensor, peer: int, lane: int) -> Message:
        """Start receiving into a contiguous tensor."""
        link = self._links[peer]
        message = Message(tensor, link, self)
        if message.rest:
            link.lanes[lane].arriving.append(message)
        return message

    def move(self) -> None:
        """Wait until something can be moved, and move it."""
        ready, waiting = select.poll(), dict[int, Link]()
        for link in self._links.values():
            for end, coming, going in link.awaited():
                if coming or going:
                    ready.register(end, select.POLLIN * coming | select.POLLOUT * going)
                    waiting[end.fileno()] = link
        if not waiting:
            raise RuntimeError("the connections to the other ranks of this machine were closed")
        found, until = ready.poll(0), time.perf_counter() + _AWAKE_SECONDS
        while not found and time.perf_counter() < until:
            with suppress(OSError):  # a container may forbid it
                os.sched_yield()  # if ranks share a core, lets the other rank run
            found = ready.poll(0)
        found = found or ready.poll(1000 * self._patience)
        if not found:
            peers = sorted({link.peer for link in waiting.values()})
            raise RuntimeError(f"no message from ranks {peers} within {self._patience:.0f} s")
        for link in {waiting[number] for number, _ in found}:
            link.move()

    def raise_if_broken(self) -> None:
        """Raise RuntimeError if a rank of this machine has closed its connection, or has died."""
        ends = select.poll()
        for link in self._links.values():
            ends.register(link.returns, 0)  # poll always reports that the other end is gone
        if ends.poll(0):
            raise RuntimeError("another rank of this machine has closed its connection")

    def close(self) -> None:
        """Close the connections. This ends the wait of every rank that waits for this rank."""
        for link in self._links.values():
            link.close()
        self._links.clear()


def _listening(listener: socket.socket, address: str, size: int) -> str:
    """The address of the listener; empty if the name of the temporary folder is too long for a Unix socket."""
    try:
        listener.bind(address)
    except OSError:
        return ""
    listener.listen(size)
    return address


def _connected(address: str, rank: int, peer: int, lanes: int) -> Link | None:
    """The link of `rank` to `peer`, which listens at `address`; None if `peer` is on another machine."""
    end = socket.socket(socket.AF_UNIX)
    try:
        end.connect(address)
    except OSError:
        end.close()
        return None
    pairs = [socket.socketpair() for _ in range(lanes)]
    file = _unnamed_file(2 * SLOTS * SLOT_BYTES)
    socket.send_fds(end, [_HELLO.pack(rank)], [*(theirs.fileno() for _, theirs in pairs), file])
    for _, theirs in pairs:
        theirs.close()
    return Link(peer, [end, *(ours for ours, _ in pairs)], file, is_first=True)


def _accepted(listener: socket.socket, lanes: int) -> Link:
    """The link to the next rank that has connected."""
    end, _ = listener.accept()
    hello, files, _, _ = socket.recv_fds(end, _HELLO.size, lanes + 1)
    for number in files:
        os.set_inheritable(number, False)
    ends = [end, *(socket.socket(fileno=number) for number in files[:-1])]
    (peer,) = _HELLO.unpack(hello)
    return Link(peer, ends, files[-1], is_first=False)


def _unnamed_file(nbytes: int) -> int:
    """The descriptor of a new file without a name. It takes memory only where it is written."""
    try:
        file = os.memfd_create("cosmos3")
    except (AttributeError, OSError):  # not Linux, or a container that forbids it
        with tempfile.TemporaryFile() as named:
            file = os.dup(named.fileno())
    os.truncate(file, nbytes)
    return file


def _advanced(queue: deque[Message], count: int) -> bool:
    """Note that `count` bytes of the first message have been moved. Returns whether `count` is positive."""
    message = queue[0]
    message.rest = message.rest[count:]
    if not message.rest:
        queue.popleft()
    return count > 0


def _tried(call: Callable[[A], T], argument: A) -> T | None:
    """The result of a socket's `call`; None if it would block. Raises OSError if the peer has gone."""
    try:
        done = call(argument)
    except BlockingIOError:
        return None
    if not done:
        raise ConnectionResetError("that rank has closed it")
    return done
