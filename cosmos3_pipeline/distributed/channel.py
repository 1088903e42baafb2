"""One lane of messages between two ranks of one machine: what is under way, and what moves it.

Small messages go through a Unix socket. Of a large one only the address does: the receiver reads it out of the
sender's memory, and returns a receipt.
"""

from __future__ import annotations

import select
import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from cosmos3_pipeline.distributed.peer_memory import Process

# What a socket's buffer takes at once, so that a message leaves without its receiver's help.
SMALL_BYTES = 192 << 10

A = TypeVar("A")
T = TypeVar("T")

_ADDRESS_BYTES = 8
_RECEIPT = b"r"


class Message:
    """A contiguous tensor under way; `done` when it has left or arrived."""

    def __init__(self, tensor: Tensor) -> None:
        # Bytes, because NumPy knows no bfloat16.
        data: Any = tensor.view(-1).view(torch.uint8).numpy()
        self.data = memoryview(data)
        self.is_small = tensor.nbytes <= SMALL_BYTES
        self.address = bytearray(tensor.data_ptr().to_bytes(_ADDRESS_BYTES))
        # What has yet to go through the socket.
        self.rest = self.data if self.is_small else memoryview(self.address)
        self.done = False


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
            sent = self._tried(self._link.send, message.rest)
            if sent is None:
                return
            message.rest = message.rest[sent:]
            if not message.rest:
                self._leaving.popleft()
                message.done = message.is_small
                if not message.is_small:
                    self._lent.append(message)

    def _read(self) -> None:
        while self._arriving:
            message = self._arriving[0]
            taken = self._tried(self._link.recv_into, message.rest)
            if taken is None:
                return
            message.rest = message.rest[self._some(taken) :]
            if not message.rest:
                self._arriving.popleft()
                message.done = message.is_small
                if not message.is_small:
                    self._process.read(int.from_bytes(message.address), message.data)
                    self._read_out.append(message)

    def _confirm(self) -> None:
        """Tell the sender what has been read out of its memory."""
        while self._read_out:
            if self._tried(self._receipts.send, _RECEIPT) is None:
                return
            self._read_out.popleft().done = True

    def _take_receipts(self) -> None:
        while self._lent:
            receipts = self._tried(self._receipts.recv, len(self._lent))
            if receipts is None:
                return
            for _ in range(self._some(len(receipts))):
                self._lent.popleft().done = True

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
