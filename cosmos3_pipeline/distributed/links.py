"""Messages on CPU between ranks of one machine, moved by the threads that wait for them.

gloo passes every message through threads of its own. On a machine whose cores all compute, those get their turn
late: a halo row took about 1.1 ms between two busy cores, and takes 0.1 ms in this way.

A small message goes through a Unix socket. A large one goes through memory that both ranks map. The sender copies
a piece of the message into a free slot, and sends the slot's number through the socket. The receiver copies the
piece out, and returns the number. While slots are free the sender waits for nobody, so that it computes the next
chunk before the receiver has asked for this one.
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

# A socket's buffer takes so many at once, so that a small message leaves without its receiver's help.
SMALL_BYTES = 192 << 10
# A piece stays in a core's cache, and a message of several is copied by sender and receiver at the same time.
SLOT_BYTES = 512 << 10
SLOTS = 256  # in each direction between two ranks; a slot's number is sent as one byte

# A rank asks its sockets for so long before it sleeps, because a core that idles is woken as slowly as a halo row
# travels. Decoding 3 latent frames of 24 x 20 in two slabs takes 1% less time with it, of 9 x 8 3%.
_AWAKE_SECONDS = 100e-6

_HELLO = struct.Struct("!I")  # the rank that connects

A = TypeVar("A")
T = TypeVar("T")


class Message:
    """A contiguous tensor in flight. `rest` is its memory that has not left, or not arrived."""

    def __init__(self, tensor: Tensor, link: Link, links: Links) -> None:
        self._tensor = tensor  # whose memory `rest` is
        self._link, self._links = link, links
        self.is_small = tensor.nbytes <= SMALL_BYTES
        self.rest = memoryview(b"")
        if tensor.nbytes:
            self.rest = memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")

    def wait(self) -> None:
        """Return when it has left or arrived. Raises RuntimeError when it never will."""
        if self.rest:
            self._link.move()  # most messages have come by now, and then nobody needs to ask for which to wait
        while self.rest:
            self._links.move()


class Lane(NamedTuple):
    """A socket, and the messages that have yet to go through it in each direction, in their order."""

    end: socket.socket
    leaving: deque[Message]
    arriving: deque[Message]


class Link:
    """What connects this rank to `peer`, which is on the same machine: lanes, and slots that they share.

    `ends` are the socket through which slots are returned and one for each lane. The memory in `file`, which is
    closed, has the slots of `is_first`'s rank in its first half. Nothing blocks.
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
        # A heap, because memory is taken only for slots that were used, and the lowest is likely to be in a cache.
        self._free = list(range(len(self._own) // SLOT_BYTES))
        self._owed = bytearray()  # the peer's slots that were read and not yet returned

    def move(self) -> None:
        """Move all that can be moved now. Raises RuntimeError when the connection is broken."""
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
        """The bytes of `message` that have left: all that the socket takes, or a piece into a slot."""
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
        """The bytes of `message` that have arrived: all that the socket has, or a piece out of a slot."""
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
        except OSError:  # a peer that has left after its last message needs no slots
            self._owed.clear()

    def awaited(self) -> Iterator[tuple[socket.socket, bool, bool]]:
        """(socket, until it can be read, until it can be written): what this rank waits for."""
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
            with suppress(OSError):  # the peer was first
                end.shutdown(socket.SHUT_RDWR)  # closing ends nothing while a fork of this process has it too
            end.close()
        for half in (self._own, self._peers):
            half.release()


class Links:
    """Links of one rank to the ranks of its group that are on the same machine, each with `lanes` lanes.

    Making them is collective over the ranks of `store`. Both ends must know the size of a message. A rank that
    waits for one message moves all that can be moved, and gives up when for `patience` seconds there was nothing.
    Errors are RuntimeErrors, as those of gloo.
    """

    # Where the files are that are gone once the links are made; None: where the system has such files.
    folder: ClassVar[str | None] = None

    def __init__(self, store: Store, rank: int, size: int, *, lanes: int, patience: float) -> None:
        self._links = dict[int, Link]()
        self._patience = patience
        with (
            tempfile.TemporaryDirectory(prefix="cosmos3-", dir=self.folder) as folder,
            stopping.leftover(Path(folder)),
            socket.socket(socket.AF_UNIX) as listener,
        ):
            here = _can_wait()
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
        """Whether messages to and from `peer` go this way; the same on both sides."""
        return peer in self._links

    def __len__(self) -> int:
        return len(self._links)

    def send(self, tensor: Tensor, peer: int, lane: int) -> Message:
        """Start sending a contiguous tensor. It must not be written before the message was awaited."""
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
                os.sched_yield()  # where ranks share a core, to the one that is waited for
            found = ready.poll(0)
        found = found or ready.poll(1000 * self._patience)
        if not found:
            peers = sorted({link.peer for link in waiting.values()})
            raise RuntimeError(f"no message from ranks {peers} within {self._patience:.0f} s")
        for link in {waiting[number] for number, _ in found}:
            link.move()

    def raise_if_broken(self) -> None:
        """Raise RuntimeError when a rank of this machine has closed its connection, or has died."""
        ends = select.poll()
        for link in self._links.values():
            ends.register(link.returns, 0)  # the system tells unasked that the other end is gone
        if ends.poll(0):
            raise RuntimeError("another rank of this machine has closed its connection")

    def close(self) -> None:
        """Close the connections, which ends the waiting of every rank that waits for this one."""
        for link in self._links.values():
            link.close()
        self._links.clear()


def _can_wait() -> bool:
    """Whether sockets can be waited for as `Links` does, which a container may forbid; gloo has its own way."""
    try:
        select.poll().poll(0)
    except (AttributeError, OSError):
        return False
    return True


def _listening(listener: socket.socket, address: str, size: int) -> str:
    """Where the listener is; nowhere, if the folder for temporary files has too long a name for a socket."""
    try:
        listener.bind(address)
    except OSError:
        return ""
    listener.listen(size)
    return address


def _connected(address: str, rank: int, peer: int, lanes: int) -> Link | None:
    """The link of `rank` to `peer`, which listens at `address`; None if that is on another machine."""
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
    """The number of an open file that has no name, and no memory before it is written."""
    try:
        file = os.memfd_create("cosmos3")
    except (AttributeError, OSError):  # not Linux, or a container that forbids it
        with tempfile.TemporaryFile() as named:
            file = os.dup(named.fileno())
    os.truncate(file, nbytes)
    return file


def _advanced(queue: deque[Message], count: int) -> bool:
    """Note that `count` bytes of the first message have been moved. Returns whether any were."""
    message = queue[0]
    message.rest = message.rest[count:]
    if not message.rest:
        queue.popleft()
    return count > 0


def _tried(call: Callable[[A], T], argument: A) -> T | None:
    """What a socket's `call` returns; None when it can do nothing now. Raises OSError when the peer has gone."""
    try:
        done = call(argument)
    except BlockingIOError:
        return None
    if not done:
        raise ConnectionResetError("that rank has closed it")
    return done
