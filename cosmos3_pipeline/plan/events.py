"""A clock for ranks that compute, send to each other, and wait: discrete events, the earliest first.

A rank is a generator. It yields seconds that it computes, or a Message that it waits for; it sends and receives in
between by calls, which take no time. A message goes when both ends are ready for it, as gloo's and NCCL's do.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Link:
    """Messages between two ranks, one way: seconds to the first byte, and bytes per second from then on.

    `busy_s` and `busy_s_per_byte` are what a message takes from the computing of each of its two ranks (on CPU
    their cores copy it), while it is under way.
    """

    latency_s: float
    bytes_per_s: float
    busy_s: float = 0.0
    busy_s_per_byte: float = 0.0

    def busy(self, nbytes: int) -> float:
        """Seconds of computing that a message costs each of its ranks."""
        return self.busy_s + nbytes * self.busy_s_per_byte


@dataclass(eq=False)
class Message:
    """From one rank to another. `arrives` is None until both are ready for it."""

    nbytes: int = 0
    sent: bool = False
    expected: bool = False
    arrives: float | None = None
    waiting: list[int] = field(default_factory=list)


Process = Iterator[float | Message]


class Clock:
    """Runs ranks against each other. A rank sends one message at a time, and takes in one at a time.

    link(a, b) is the link from rank a to rank b.
    """

    def __init__(self, ranks: int, link: Callable[[int, int], Link]) -> None:
        self.now = 0.0
        self.busy = [0.0] * ranks
        self.waiting = [0.0] * ranks
        self.sent_bytes = [0] * ranks
        self.sent_messages = [0] * ranks
        self.link = link
        self._outgoing_free = [0.0] * ranks
        self._incoming_free = [0.0] * ranks
        # Messages of which one end is ready, in the order in which they were posted.
        self._half: dict[tuple[int, int], deque[Message]] = defaultdict(deque)
        self._due: list[tuple[float, int, int]] = []
        self._count = 0

    def send(self, source: int, target: int, nbytes: int) -> Message:
        """Rank `source` is ready to send."""
        self.sent_bytes[source] += nbytes
        self.sent_messages[source] += 1
        message = self._matching(source, target, sent=True)
        message.nbytes, message.sent = nbytes, True
        return self._go(message, source, target)

    def receive(self, source: int, target: int) -> Message:
        """Rank `target` is ready to receive."""
        message = self._matching(source, target, sent=False)
        message.expected = True
        return self._go(message, source, target)

    def _matching(self, source: int, target: int, *, sent: bool) -> Message:
        half = self._half[source, target]
        if half and half[0].sent != sent:
            return half.popleft()
        half.append(Message())
        return half[-1]

    def _go(self, message: Message, source: int, target: int) -> Message:
        if not (message.sent and message.expected):
            return message
        link = self.link(source, target)
        start = max(self.now, self._outgoing_free[source], self._incoming_free[target])
        transfer = message.nbytes / link.bytes_per_s
        self._outgoing_free[source] = self._incoming_free[target] = start + transfer
        message.arrives = start + link.latency_s + transfer
        for rank in message.waiting:
            self.waiting[rank] += message.arrives
            self._at(message.arrives, rank)
        return message

    def _at(self, time: float, rank: int) -> None:
        self._count += 1  # of events at the same time, the one that was known first
        heapq.heappush(self._due, (time, self._count, rank))

    def run(self, processes: Sequence[Process]) -> None:
        """Run every rank to its end."""
        for rank in range(len(processes)):
            self._at(self.now, rank)
        ended = 0
        while self._due:
            self.now, _, rank = heapq.heappop(self._due)
            ended += not self._step(rank, processes[rank])
        assert ended == len(processes), "some ranks wait for messages that nobody sends"

    def _step(self, rank: int, process: Process) -> bool:
        """Let `rank` go on until it computes or waits. False when it has ended."""
        for wanted in process:
            if isinstance(wanted, Message):
                if wanted.arrives is None:
                    wanted.waiting.append(rank)
                    self.waiting[rank] -= self.now
                elif wanted.arrives > self.now:
                    self.waiting[rank] += wanted.arrives - self.now
                    self._at(wanted.arrives, rank)
                else:
                    continue
            else:
                self.busy[rank] += wanted
                self._at(self.now + wanted, rank)
            return True
        return False
