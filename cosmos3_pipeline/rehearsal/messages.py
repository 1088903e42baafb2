"""Messages that are not sent: a log of what a rank would send and receive, and where it would wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from torch import Tensor

from cosmos3_pipeline.distributed.accelerator import Region, Work
from cosmos3_pipeline.distributed.board import Notice
from cosmos3_pipeline.distributed.comm import Comm, Pair, Pending
from cosmos3_pipeline.distributed.ledger import Ledger
from cosmos3_pipeline.distributed.mesh import AXES, REPLICA, SEQUENCE, RankMesh
from cosmos3_pipeline.rehearsal.places import Place, asker, askers
from cosmos3_pipeline.rehearsal.tracker import ACCELERATOR

T = TypeVar("T")
AGREEMENTS = ", agreements"  # suffix of a group's name for the agreements between its hosts


@dataclass(frozen=True)
class Event:
    """One message of a rank, or its part in a collective. `peer` is a rank of the world, None in a collective.

    `place` is the line that asks for the message, and `caller` the line in another file that called it.
    """

    kind: str  # send, recv, or a collective's name
    peer: int | None
    nbytes: int
    dtype: str
    place: Place
    caller: Place

    def __str__(self) -> str:
        return f"{self.nbytes:,} bytes of {self.dtype} ({self.place.name}, called at {self.caller.name})"


@dataclass(frozen=True)
class Start:
    """A rank starts `events` on the communicator of `group`: one collective, or one batch of messages.

    The communicator begins the next start only when all of these events are done.
    """

    number: int
    group: str
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Wait:
    """A rank waits until start `number` is done."""

    number: int
    place: Place


@dataclass
class Log:
    """The starts and waits of one rank, in order. `members` maps a group's name to its ranks.

    `on_host` are lines that wrongly send a tensor of the host.
    """

    acts: list[Start | Wait] = field(default_factory=list)
    members: dict[str, tuple[int, ...]] = field(default_factory=dict)
    on_host: list[Place] = field(default_factory=list)

    def start(self, group: str, *events: Event) -> _Arrived:
        """Log the start of `events`. The `wait` of the returned object logs a wait for them."""
        number = len(self.acts)
        self.acts.append(Start(number, group, events))
        return _Arrived(self, number)

    def events(self, group: str) -> list[Event]:
        """All events of `group`, in the order in which they begin."""
        started = (act for act in self.acts if isinstance(act, Start) and act.group == group)
        return [event for act in started for event in act.events]


class _Arrived:
    """A message in flight whose wait is only logged."""

    def __init__(self, log: Log, number: int) -> None:
        self._log = log
        self._number = number

    def wait(self) -> None:
        self._log.acts.append(Wait(self._number, asker()))


class _Silence:
    """A board without notices."""

    def raise_if_over(self, run: int) -> None: ...

    def post(self, run: int, notice: Notice) -> None: ...


class _NoLinks:
    """Links without peers."""

    def raise_if_broken(self) -> None: ...


class RehearsedComm(Comm):
    """Logs the messages of rank `rank` of the world in the group `members` to `log`.

    In an agreement every rank has this rank's value. Received tensors have no values.
    """

    def __init__(self, name: str, rank: int, members: Sequence[int], log: Log) -> None:
        super().__init__(None, Ledger(), device=ACCELERATOR)
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
        # Agreements are between hosts, so their order is independent of messages between accelerators.
        self._log.start(f"{self._name}{AGREEMENTS}", Event("agreement", None, 0, "objects", *askers())).wait()
        return [value] * self.size

    def _exchange_on_cpu(self, sends: Sequence[Region], receives: Sequence[Region], lane: int) -> Pending:
        self._log.on_host.append(asker())
        return self._pending()

    def _start_batch(self, landings: Sequence[Region], leaving: Sequence[Region]) -> list[Work]:
        events = [self._event("recv", tensor, peer) for tensor, peer in landings]
        events += [self._event("send", tensor, peer) for tensor, peer in leaving]
        return [self._log.start(self._name, *events)]

    def _connect_pair(self, pair: Pair) -> None:
        # Making the connection blocks both ranks of the pair until both have come.
        self._pairs[pair] = cast(Any, None)
        source, target = (self._members[rank] for rank in pair)
        name = f"{self._name}, from {source} to {target}"
        self._log.members[name] = (source, target)
        self._log.start(name, Event("connection", None, 0, "objects", *askers())).wait()

    def _start_pair(self, pair: Pair, tensors: Sequence[Tensor]) -> list[Work]:
        assert pair in self._pairs, f"connect_pairs() has not named the messages of {pair}"
        source, target = (self._members[rank] for rank in pair)
        kind, peer = ("send", pair[1]) if pair[0] == self.rank else ("recv", pair[0])
        events = [self._event(kind, tensor, peer) for tensor in tensors]
        return [self._log.start(f"{self._name}, from {source} to {target}", *events)]

    def _start_broadcast(self, tensor: Tensor, source: int) -> Work:
        return self._log.start(self._name, self._event(f"broadcast of rank {self._members[source]}", tensor))

    def _start_all_gather(self, parts: list[Tensor], tensor: Tensor) -> Work:
        return self._log.start(self._name, self._event("all_gather", tensor))

    def _start_gather_into(self, whole: Tensor, own: Tensor) -> Work:
        return self._log.start(self._name, self._event("gather_into", own))

    def _event(self, kind: str, tensor: Tensor, peer: int | None = None) -> Event:
        if not tensor.is_meta:
            self._log.on_host.append(asker())
        world = None if peer is None else self._members[peer]
        return Event(kind, world, tensor.nbytes, str(tensor.dtype).removeprefix("torch."), *askers())


@dataclass(frozen=True)
class RehearsedMesh(RankMesh):
    """The mesh of a world in which only rank `place` exists; its messages are logged in `log`."""

    place: int = 0
    log: Log = field(default_factory=Log)

    def rank(self, axis: str) -> int:
        """This rank's index on `axis`, from 0."""
        if axis in (REPLICA, SEQUENCE):
            return self.place % self.size(axis)
        stride = self._stride(axis)
        return self.place // stride % self.size(axis)

    def new_comm(self, axis: str) -> Comm:
        """The Comm between this rank and the ranks that differ from it only on `axis`."""
        members = self._members(axis)
        made = sum(name.startswith(f"{axis} ") and "," not in name for name in self.log.members)
        name = f"{axis} {'-'.join(map(str, members))} #{made}"
        self.log.members |= dict.fromkeys((name, f"{name}{AGREEMENTS}"), tuple(members))
        return RehearsedComm(name, self.place, members, self.log)

    def _stride(self, axis: str) -> int:
        stride = 1
        for other in AXES[AXES.index(axis) + 1 :]:
            stride *= self.size(other)
        return stride

    def _members(self, axis: str) -> list[int]:
        stride = 1 if axis in (REPLICA, SEQUENCE) else self._stride(axis)
        first = self.place - self.rank(axis) * stride
        return [first + number * stride for number in range(self.size(axis))]
