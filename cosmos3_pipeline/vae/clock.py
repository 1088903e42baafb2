"""Simulates a run with seconds instead of tensors: when do the actions of each rank end? Imports no torch.

A rank starts its next action at once, unless the action needs a message that has not arrived. A message starts
when both ends are ready, as with gloo and NCCL. A rank sends one message at a time and receives one at a time. The
real convolution computes some rows before its halo arrives; in this model it waits for the halo first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

from cosmos3_pipeline.vae.assignment import Tile
from cosmos3_pipeline.vae.lowering import (
    Emit,
    Enter,
    Halo,
    Lowered,
    Message,
    Post,
    Recall,
    Repeated,
    Run,
    Send,
    Yield,
)
from cosmos3_pipeline.vae.ops import WHOLE, Sides
from cosmos3_pipeline.vae.program import Program


class OpCosts(Protocol):
    """Seconds of the ops of a program on one rank."""

    def seconds(self, op: int, rows: float, sides: Sides = WHOLE, *, first: bool) -> float:
        """Seconds of op `op` for one chunk of `rows` latent rows of the clip's full width.

        `first`: the clip's first chunk, which has one frame everywhere. A narrower tile counts as fewer rows of
        the full width. `sides`: where other tiles lie.
        """
        ...


@dataclass(frozen=True)
class Link:
    """Messages from one rank to another: seconds to the first byte, and bytes per second from then on.

    `busy_s` and `busy_s_per_byte` are the computing time that a message costs each of its two ranks while it is in
    flight. On CPU this is the time in which their cores copy the message.
    """

    latency_s: float
    bytes_per_s: float
    busy_s: float = 0.0
    busy_s_per_byte: float = 0.0

    def busy(self, nbytes: int) -> float:
        """Seconds of computing that a message costs each of its ranks."""
        return self.busy_s + nbytes * self.busy_s_per_byte


NO_TIME = Link(0.0, float("inf"))
Links = Callable[[int, int], Link]  # from rank a to rank b


@dataclass(frozen=True)
class Timeline:
    """The times of one clip, in seconds.

    busy_s: for each rank, how long it computes.
    results: when each portion of the result is handed out.
    events: (rank, what, begin, end) of each run of ops, if asked for.
    """

    seconds: float
    busy_s: tuple[float, ...]
    results: tuple[float, ...]
    events: tuple[tuple[int, str, float, float], ...] = ()

    def trace(self) -> dict[str, Any]:
        """The events in the format of Perfetto and chrome://tracing."""
        return {
            "traceEvents": [
                {"ph": "X", "name": what, "pid": 0, "tid": rank, "ts": 1e6 * begin, "dur": 1e6 * (end - begin)}
                for rank, what, begin, end in self.events
            ]
        }


def timeline(lowered: Lowered, costs: OpCosts, links: Links | None = None, *, events: bool = False) -> Timeline:
    """Simulate the actions of all ranks. Without `links`, messages take no time."""
    return _Clock(lowered, costs, links, events=events).run()


class FlopCosts:
    """Uses the FLOPs of an op as its seconds, in proportion to the rows of the tile."""

    def __init__(self, lowered: Lowered) -> None:
        self._rows = lowered.shape.rows
        self._flops = {
            first: [
                op.flops(lowered.shape, first=first) + op.dropped_flops(lowered.shape, first=first)
                for op in lowered.program.ops
            ]
            for first in (True, False)
        }

    def seconds(self, op: int, rows: float, sides: Sides = WHOLE, *, first: bool) -> float:
        return self._flops[first][op] * rows / self._rows


def flops_until_end(clip: Repeated) -> float:
    """FLOPs on the critical path: those of the slowest rank and of the work for which this rank waits."""
    return clip.total(
        lambda lowered: (
            float(lowered.program.flops(lowered.shape))
            if lowered.everywhere
            else timeline(lowered, FlopCosts(lowered)).seconds
        )
    )


@dataclass(slots=True)
class _Flight:
    """A message: when its sender and its receiver were ready, and when it arrives. Negative: not yet."""

    sent: float = -1.0
    posted: float = -1.0
    arrives: float = -1.0


class _HaloTimes(NamedTuple):
    """One halo exchange: the peers, its seconds once all peers are ready, and the computing time that it costs.

    edges: the share of the previous op that must be computed before the exchange begins. A rank sends its messages
    one by one.
    """

    peers: tuple[int, ...]
    seconds: float
    busy: float
    edges: float


@dataclass
class _Rank:
    now: float = 0.0
    busy: float = 0.0
    outgoing_free: float = 0.0
    incoming_free: float = 0.0
    leaving: deque[tuple[int, list[_Flight]]] = field(default_factory=deque)
    results: deque[list[_Flight]] = field(default_factory=deque)


class _Clock:
    def __init__(self, lowered: Lowered, costs: OpCosts, links: Links | None, *, events: bool) -> None:
        self._low = lowered
        self._program: Program = lowered.program
        self._costs = costs
        self._links = links or _no_time
        self._free = links is None
        self._ranks = [_Rank() for _ in range(lowered.ranks)]
        self._flights: dict[Any, _Flight] = {}
        self._results: list[float] = []
        self._events: list[tuple[int, str, float, float]] | None = [] if events else None
        self._sums: dict[tuple[float, Sides, bool, int], list[float]] = {}
        self._halo_numbers: dict[Any, list[int]] = {}
        self._halos: dict[Any, _HaloTimes] = {}
        self._posts: dict[
            tuple[int, int, int, int], float
        ] = {}  # when a rank is ready, by chunk, part, op and rank

    def run(self) -> Timeline:
        waiting = deque(self._process(rank) for rank in range(self._low.ranks))
        idle = 0
        while waiting:
            process = waiting.popleft()
            state = next(process, "ended")
            if state != "ended":
                waiting.append(process)
                idle = 0 if state == "moved" else idle + 1
                assert idle <= len(waiting), "ranks wait for messages that nobody sends"
            else:
                idle = 0
        ranks = self._ranks
        return Timeline(
            max(rank.now for rank in ranks),
            tuple(rank.busy for rank in ranks),
            tuple(self._results),
            tuple(self._events or ()),
        )

    def _process(self, number: int) -> Iterator[str]:
        """Runs the actions of rank `number`. While it waits it yields; "moved" if it did something before."""
        rank = self._ranks[number]
        for action in self._low.actions[number]:
            if isinstance(action, Run):
                yield from self._compute(number, rank, action)
            elif isinstance(action, Post):
                for message in action.messages:
                    self._receive(rank, message)
            elif isinstance(action, Send):
                while self._low.must_wait([due for due, _ in rank.leaving], action):
                    yield from self._wait(rank, rank.leaving.popleft()[1])
                flights = [self._send(rank, message) for message in action.messages]
                rank.leaving.append((max(message.due for message in action.messages), flights))
            elif isinstance(action, Enter | Recall):
                messages = [piece.origin for piece in action.pieces if isinstance(piece.origin, Message)]
                if messages:
                    yield from self._wait(rank, [self._flight(id(message)) for message in messages])
            elif isinstance(action, Emit):
                found = []
                for piece in action.pieces:
                    if isinstance(piece.origin, Message):
                        found.append(self._receive(rank, piece.origin))
                rank.results.append(found)
            elif isinstance(action, Yield):
                yield from self._wait(rank, rank.results.popleft())
                if number == 0:
                    self._results.append(rank.now)
        while rank.leaving:
            yield from self._wait(rank, rank.leaving.popleft()[1])

    # -------------------------------------------------------------------------------------------------- computing
    def _compute(self, number: int, rank: _Rank, run: Run) -> Iterator[str]:
        portions = self._low.portions(run.chunk, run.part)
        tile = run.tile
        rows = tile.rect.area / tile.unit**2 / self._low.shape.cols
        sums = self._sums_of(rows, self._low.sides(tile), portions, first=run.chunk == 0)
        begin, at = rank.now, run.start
        for op in self._halo_ops(run):
            if op > run.start:
                # The rows that other tiles read are computed first. They are sent while the rest is computed.
                last = sums[op] - sums[op - 1]
                halo = self._halo(number, run, op, portions)
                edges = last * halo.edges
                rank.now += sums[op - 1] - sums[at] + edges
                rank.busy += sums[op - 1] - sums[at] + last + halo.busy
                self._posts[run.chunk, run.part, op, number] = rank.now
                rank.now += last - edges + halo.busy
                at = op
                if op == run.stop:  # the exchange belongs to the next run
                    continue
            else:
                halo = self._halo(number, run, op, portions)
                if (run.chunk, run.part, op, number) not in self._posts:
                    self._posts[run.chunk, run.part, op, number] = rank.now
                    rank.now += halo.busy
                    rank.busy += halo.busy
            yield from self._neighbours(number, rank, run, op, halo)
        self._spend(rank, sums[run.stop] - sums[at])
        if self._events is not None:
            self._events.append((number, f"chunk {run.chunk}: ops {run.start}-{run.stop - 1}", begin, rank.now))

    def _sums_of(self, rows: float, sides: Sides, portions: int, *, first: bool) -> list[float]:
        """Cumulative seconds before each op, for one portion of `rows` rows."""
        key = (rows, sides, first, portions)
        if key not in self._sums:
            ops = range(len(self._program))
            each = [self._costs.seconds(op, rows, sides, first=first) / portions for op in ops]
            self._sums[key] = [0.0, *accumulate(each)]
        return self._sums[key]

    def _spend(self, rank: _Rank, seconds: float) -> None:
        rank.now += seconds
        rank.busy += seconds

    def _halo_ops(self, run: Run) -> Sequence[int]:
        """The ops of a run that exchange halos, and the op after the run if its exchange starts in this run."""
        if not run.halos:
            return ()
        key = (id(run.halos), run.start, run.stop, run.goes_on)
        if key not in self._halo_numbers:
            stop = run.stop + 1 if run.goes_on else run.stop
            self._halo_numbers[key] = [op for op in run.halos if run.start <= op < stop]
        return self._halo_numbers[key]

    def _halo(self, number: int, run: Run, op: int, portions: int) -> _HaloTimes:
        key = (id(run.halos), op, run.chunk == 0, portions)
        if key not in self._halos:
            halo = run.halos[op]
            b, t, _, _, c = self._program.ops[op].source.shape(self._low.shape, first=run.chunk == 0)
            size = b * (t // portions) * c * self._low.shape.element_bytes
            out = [(self._links(number, peer), size * rect.area) for rect, peer in halo.sends]
            into = [(self._links(peer, number), size * rect.area) for rect, peer in halo.receives]
            transfer = max(sum(n / link.bytes_per_s for link, n in each) for each in (out, into))
            self._halos[key] = _HaloTimes(
                peers=tuple({peer for _, peer in (*halo.sends, *halo.receives)}),
                seconds=max(link.latency_s for link, _ in (*out, *into)) + transfer,
                busy=sum(link.busy(n) for link, n in (*out, *into)),
                edges=self._edges(op, run.tile, halo) if op and self._program.ops[op - 1].leaves_room else 1.0,
            )
        return self._halos[key]

    def _edges(self, op: int, tile: Tile, halo: Halo) -> float:
        """The share of a tile that other ranks read: rows and columns at its edges; corners count once."""
        core, _ = self._low.input_rect(op, tile)
        rects = [rect for rect, _ in halo.sends]
        top = max((r.height for r in rects if r.top == core.top and r.height < core.height), default=0)
        bottom = max((r.height for r in rects if r.bottom == core.bottom and r.height < core.height), default=0)
        left = max((r.width for r in rects if r.left == core.left and r.width < core.width), default=0)
        right = max((r.width for r in rects if r.right == core.right and r.width < core.width), default=0)
        inner = max(0, core.height - top - bottom) * max(0, core.width - left - right)
        return 1 - inner / core.area

    def _neighbours(self, number: int, rank: _Rank, run: Run, op: int, halo: _HaloTimes) -> Iterator[str]:
        """Wait until the halos of this tile have arrived, and until the other tiles have received theirs."""
        posts, chunk, part = self._posts, run.chunk, run.part
        ready, moved = posts[chunk, part, op, number], True
        for peer in halo.peers:
            while (posted := posts.get((chunk, part, op, peer))) is None:
                yield "moved" if moved else "waits"
                moved = False
            if posted > ready:
                ready = posted
        if ready + halo.seconds > rank.now:
            rank.now = ready + halo.seconds

    # -------------------------------------------------------------------------------------------------- messages
    def _wait(self, rank: _Rank, flights: list[_Flight]) -> Iterator[str]:
        moved = True
        for flight in flights:
            while flight.arrives < 0:
                yield "moved" if moved else "waits"
                moved = False
            rank.now = max(rank.now, flight.arrives)

    def _flight(self, key: Any) -> _Flight:
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight()
        return flight

    def _send(self, rank: _Rank, message: Message) -> _Flight:
        flight = self._flight(id(message))
        nbytes = self._low.message_bytes(message)
        self._pay(rank, message.source, message.target, nbytes)
        flight.sent = rank.now
        return self._go(flight, message.source, message.target, nbytes)

    def _receive(self, rank: _Rank, message: Message) -> _Flight:
        flight = self._flight(id(message))
        if flight.posted >= 0:
            return flight
        nbytes = self._low.message_bytes(message)
        self._pay(rank, message.source, message.target, nbytes)
        flight.posted = rank.now
        return self._go(flight, message.source, message.target, nbytes)

    def _pay(self, rank: _Rank, source: int, target: int, nbytes: int) -> None:
        """Add the computing time that a message costs a CPU rank."""
        if not self._free:
            self._spend(rank, self._links(source, target).busy(nbytes))

    def _go(self, flight: _Flight, source: int, target: int, nbytes: int) -> _Flight:
        if flight.sent < 0 or flight.posted < 0 or flight.arrives >= 0:
            return flight
        start = max(flight.sent, flight.posted)
        if self._free:
            flight.arrives = start
            return flight
        link, sender, taker = self._links(source, target), self._ranks[source], self._ranks[target]
        start = max(start, sender.outgoing_free, taker.incoming_free)
        transfer = nbytes / link.bytes_per_s
        sender.outgoing_free = taker.incoming_free = start + transfer
        flight.arrives = start + link.latency_s + transfer
        return flight


def _no_time(source: int, target: int) -> Link:
    return NO_TIME
