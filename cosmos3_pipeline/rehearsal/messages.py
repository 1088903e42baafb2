"""Messages that go nowhere: what a rank would send and receive, and whether that meets a counterpart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from cosmos3_pipeline.distributed.accelerator import AcceleratorWork, Region
from cosmos3_pipeline.distributed.board import Notice
from cosmos3_pipeline.distributed.comm import Comm, Pending
from cosmos3_pipeline.distributed.ledger import Ledger
from cosmos3_pipeline.distributed.mesh import REPLICA, RankMesh
from cosmos3_pipeline.rehearsal.places import Place, here

T = TypeVar("T")


@dataclass(frozen=True)
class Event:
    """One message of a rank, or its part in a collective. `peer` is a rank of the world, None in a collective."""

    kind: str  # send, recv, or a collective's name
    peer: int | None
    nbytes: int
    place: Place


@dataclass
class Log:
    """The events of one rank, by the group whose messages they are, in the order in which they begin.

    `on_host` are places that give a message a tensor of the host.
    """

    events: dict[str, list[Event]] = field(default_factory=lambda: defaultdict(list))
    on_host: list[Place] = field(default_factory=list)


class _Arrived:
    """A message that is there already."""

    def wait(self) -> None: ...


class _Silence:
    """A board on which nobody writes."""

    def raise_if_over(self, run: int) -> None: ...

    def post(self, run: int, notice: Notice) -> None: ...


class _NoLinks:
    """The connections of a rank whose peers are not there."""

    def raise_if_broken(self) -> None: ...


class RehearsedComm(Comm):
    """The messages of the rank `rank` of the world with `members`, into `log`.

    Everybody agrees with this rank. What is received has a shape and no values.
    """

    def __init__(self, name: str, rank: int, members: Sequence[int], log: Log) -> None:
        super().__init__(None, Ledger())
        self.rank, self.size = members.index(rank), len(members)
        self._name, self._members, self._log = name, members, log
        if self.size > 1:
            self._board: Any = _Silence()
            self._links: Any = _NoLinks()

    def _connect(self) -> None:
        self._broken = False

    def _close(self) -> None: ...

    def _gather_objects(self, value: T) -> list[T]:
        self.ledger.record("control", 0)
        return [value] * self.size

    def _exchange_on_cpu(self, sends: Sequence[Region], receives: Sequence[Region], lane: int) -> Pending:
        self._log.on_host.append(here())
        return self._pending()

    def _start_batch(self, landings: Sequence[Region], leaving: Sequence[Region]) -> list[AcceleratorWork]:
        for kind, regions in (("recv", landings), ("send", leaving)):
            for tensor, peer in regions:
                self._note(kind, tensor, peer)
        return [_Arrived()]

    def _start_broadcast(self, tensor: Tensor, source: int) -> AcceleratorWork:
        return self._note(f"broadcast of rank {source}", tensor)

    def _start_all_gather(self, parts: list[Tensor], tensor: Tensor) -> AcceleratorWork:
        return self._note("all_gather", tensor)

    def _start_gather_into(self, whole: Tensor, own: Tensor) -> AcceleratorWork:
        return self._note("gather_into", own)

    def _note(self, kind: str, tensor: Tensor, peer: int | None = None) -> AcceleratorWork:
        if not tensor.is_meta:
            self._log.on_host.append(here())
        world = None if peer is None else self._members[peer]
        self._log.events[self._name].append(Event(kind, world, tensor.nbytes, here()))
        return _Arrived()


@dataclass(frozen=True)
class RehearsedMesh(RankMesh):
    """The mesh of a world in which only the rank `place` is there; its messages go into `log`."""

    place: int = 0
    log: Log = field(default_factory=Log)

    def rank(self, axis: str) -> int:
        """This rank's place on `axis`, from 0."""
        if axis == REPLICA:
            return self.place % self.size(REPLICA)
        stride = self._stride(axis)
        return self.place // stride % self.size(axis)

    def new_comm(self, axis: str) -> Comm:
        """Messages between this rank and those that differ from it on `axis` only."""
        members = self._members(axis)
        known = sum(name.startswith(f"{axis} ") for name in self.log.events)
        name = f"{axis} {'-'.join(map(str, members))} #{known}"
        self.log.events[name] = []
        return RehearsedComm(name, self.place, members, self.log)

    def _stride(self, axis: str) -> int:
        order = ("ulysses", "cfg", "spare", "dp")  # fastest first
        stride = 1
        for other in order[: order.index(axis)]:
            stride *= self.size(other)
        return stride

    def _members(self, axis: str) -> list[int]:
        stride = 1 if axis == REPLICA else self._stride(axis)
        first = self.place - self.rank(axis) * stride
        return [first + number * stride for number in range(self.size(axis))]


def unmet(logs: Mapping[int, Log]) -> Iterator[str]:
    """Messages between ranks in `logs` that meet no counterpart, in words; ranks that are not in it are not asked.

    Messages of a pair arrive in the order in which they are sent, so the n-th send meets the n-th receive. The
    collectives of a group are the same ones in the same order on all of its ranks.
    """
    for source, log in logs.items():
        for group, events in log.events.items():
            for target, other in logs.items():
                theirs = other.events.get(group)
                if target == source or theirs is None:
                    continue
                yield from _pair(group, source, target, events, theirs)
                if source < target:
                    yield from _collectives(group, source, target, events, theirs)


def _pair(group: str, source: int, target: int, mine: list[Event], theirs: list[Event]) -> Iterator[str]:
    sends = [event for event in mine if event.kind == "send" and event.peer == target]
    receives = [event for event in theirs if event.kind == "recv" and event.peer == source]
    for number, (send, receive) in enumerate(zip(sends, receives, strict=False)):
        if send.nbytes != receive.nbytes:
            yield (
                f"{group}: rank {source} sends rank {target} {send.nbytes} bytes as message {number} "
                f"({send.place.name}), which receives {receive.nbytes} ({receive.place.name})"
            )
            return
    for event in _beyond(sends, receives):
        yield (
            f"{group}: rank {source} sends rank {target} {len(sends)} messages, which receives {len(receives)}; "
            f"nobody receives the one of {event.place.name}"
        )
    for event in _beyond(receives, sends):
        yield (
            f"{group}: rank {target} waits for {len(receives)} messages of rank {source}, which sends "
            f"{len(sends)}; nobody sends the one of {event.place.name}"
        )


def _beyond(longer: Sequence[Event], shorter: Sequence[Event]) -> Iterable[Event]:
    """The first of `longer` that has no counterpart."""
    return longer[len(shorter) : len(shorter) + 1]


def _collectives(group: str, one: int, other: int, mine: list[Event], theirs: list[Event]) -> Iterator[str]:
    first, second = ([(e.kind, e.nbytes) for e in events if e.peer is None] for events in (mine, theirs))
    if first != second:
        yield f"{group}: ranks {one} and {other} take part in different collectives, or in another order"
