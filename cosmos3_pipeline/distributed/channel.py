"""One lane of messages between two ranks of one machine: what is under way, and what moves it.

Small messages go through a Unix socket. Of a large one only the address does: the receiver reads it out of the
sender's memory, and returns a receipt.
"""

from __future__ import annotations

import ctypes
import select
import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from cosmos3_pipeline.distributed.peer_memory import Process

# What a socket's buffer takes at once, so that a message leaves without its receiver's help.
SMALL_BYTES = 192 << 10
# A message in more places than this is copied together: each costs time, and a system call takes 1024 at most.
MOST_PLACES = 64

A = TypeVar("A")
T = TypeVar("T")

_ADDRESS_BYTES = 8
_RECEIPT = b"r"


class Message:
    """A tensor under way, of any strides; `done` when it has left or, if it `arrives`, arrived.

    It goes straight out of and into its places in memory. One in very many places goes through a contiguous copy,
    and so does a large one with gaps that leaves, because one address says where it is.
    """

    def __init__(self, tensor: Tensor, *, arrives: bool = False) -> None:
        nbytes = tensor.nbytes
        self.is_small = nbytes <= SMALL_BYTES
        self.done = False
        self._memory = tensor
        self._target: Tensor | None = None  # of a copy that arrives
        offsets = _offsets(tensor.shape, tensor.stride(), tensor.element_size())
        if not offsets or (len(offsets) > 1 and not self.is_small and not arrives):
            offsets = (0,)
            if arrives:
                self._target = tensor
                self._memory = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            else:
                self._memory = tensor.contiguous()
        start, self._length = self._memory.data_ptr(), nbytes // len(offsets)
        self._places = [start + offset for offset in offsets]
        # What has yet to go through the socket: the message, or the address of a large one.
        self.rest: list[Any]
        if self.is_small:
            array = _bytes_array(self._length)
            self.rest = [array.from_address(place) for place in self._places]
        else:
            self._address = bytearray(start.to_bytes(_ADDRESS_BYTES))
            self.rest = [self._address]

    def went(self, count: int) -> bool:
        """`count` more bytes have gone through the socket; whether these were the last."""
        rest = self.rest
        while rest and count >= len(rest[0]):
            count -= len(rest.pop(0))
        if count:
            rest[0] = memoryview(rest[0])[count:]
        return not rest

    def read_from(self, process: Process) -> None:
        """Read a large message, of which the address has arrived, out of the sender's memory."""
        address = int.from_bytes(self._address)
        for number, place in enumerate(self._places):
            process.read(address + number * self._length, place, self._length)

    def finish(self) -> None:
        """It has left or arrived."""
        if self._target is not None:
            self._target.copy_(self._memory)
        self.done = True


@lru_cache(maxsize=1 << 10)  # since the next chunk's tensors lie as this one's do
def _offsets(shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Where the elements of a tensor, each of `size` bytes, lie in order, in bytes from its first one.

    Equally many lie at each place without a gap. Empty when there are more places than MOST_PLACES.
    """
    length, offsets = size, [0]
    for count, stride in zip(reversed(shape), reversed(strides), strict=True):
        if count == 1:
            continue
        if length == stride * size and len(offsets) == 1:
            length *= count
        elif count * len(offsets) > MOST_PLACES:
            return ()
        else:
            offsets = [i * stride * size + offset for i in range(count) for offset in offsets]
    return tuple(offsets)


@lru_cache(maxsize=1 << 10)
def _bytes_array(count: int) -> Any:
    return ctypes.c_char * count


class Channel:
    """A lane to rank `peer`, which runs in `process`: a socket for messages and one for receipts.

    Messages arrive in the order in which they are sent. Nothing blocks. Raises RuntimeError when the connection is
    broken.
    """

    def __init__(self, peer: int, process: Process, link: socket.socket, receipts: socket.socket) -> None:
        self.peer = peer
        self._process = process
        self._link = link
        self._receipts = receipts
        self._leaving = deque[Message]()
        self._arriving = deque[Message]()
        # Large messages that the other end has not said to have read: their tensors must stay where they are.
        self._lent = deque[Message]()
        # Large messages that this end has read. They are what was sent only if the sender is there to be told.
        self._read_out = deque[Message]()
        for end in (link, receipts):
            end.setblocking(False)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * SMALL_BYTES)

    def send(self, message: Message) -> None:
        self._leaving.append(message)
        self._write()

    def receive(self, message: Message) -> None:
        self._arriving.append(message)

    def awaited(self) -> Iterator[tuple[int, int]]:
        """(file number, events of `select.poll`) that this channel waits for."""
        for end, coming, going in (
            (self._link, self._arriving, self._leaving),
            (self._receipts, self._lent, self._read_out),
        ):
            events = select.POLLIN * bool(coming) | select.POLLOUT * bool(going)
            if events:
                yield end.fileno(), events

    def move(self) -> None:
        """Move all that can be moved now."""
        self._write()
        self._read()
        self._confirm()
        self._take_receipts()

    def close(self) -> None:
        """End both connections, so that the other end takes nothing that it then reads for a message."""
        for end in (self._receipts, self._link):
            with suppress(OSError):  # the other end was first
                end.shutdown(socket.SHUT_RDWR)  # closing does not end it while a fork of this process has it too
            end.close()

    def _write(self) -> None:
        while self._leaving:
            message = self._leaving[0]
            sent = self._tried(self._link.sendmsg, message.rest)
            if sent is None:
                return
            if message.went(sent):
                self._leaving.popleft()
                if message.is_small:
                    message.finish()
                else:
                    self._lent.append(message)

    def _read(self) -> None:
        while self._arriving:
            message = self._arriving[0]
            taken = self._tried(self._link.recvmsg_into, message.rest)
            if taken is None:
                return
            if message.went(self._some(taken[0])):
                self._arriving.popleft()
                if message.is_small:
                    message.finish()
                else:
                    message.read_from(self._process)
                    self._read_out.append(message)

    def _confirm(self) -> None:
        """Tell the sender what has been read out of its memory."""
        while self._read_out:
            if self._tried(self._receipts.send, _RECEIPT) is None:
                return
            self._read_out.popleft().finish()

    def _take_receipts(self) -> None:
        while self._lent:
            receipts = self._tried(self._receipts.recv, len(self._lent))
            if receipts is None:
                return
            for _ in range(self._some(len(receipts))):
                self._lent.popleft().finish()

    def _tried(self, call: Callable[[A], T], argument: A) -> T | None:
        """What a socket's `call` returns; None when it cannot do anything now."""
        try:
            return call(argument)
        except BlockingIOError:
            return None
        except OSError as error:
            raise RuntimeError(f"the connection to rank {self.peer} is closed ({error})") from error

    def _some(self, count: int) -> int:
        """`count` bytes were received; none are the end."""
        if not count:
            raise RuntimeError(f"rank {self.peer} has closed its connection")
        return count
