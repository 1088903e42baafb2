"""Replays the messages of all ranks: does each have a counterpart, and is their order free of deadlocks?

The replay follows NCCL's rules. A communicator runs one start (a batch of messages, or a collective) after the
other, in the order of its rank's calls. Within a batch, messages to different ranks are in flight at the same
time. A message is done once both of its ranks have reached it, because NCCL need not send ahead. A rank that waits
starts nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cosmos3_pipeline.rehearsal.messages import Event, Log, Start, Wait


def faults_of(logs: Mapping[int, Log]) -> list[str]:
    """The faults of the messages of the ranks in `logs`, as text; messages of other ranks are not checked.

    The order is replayed only if every message has a counterpart, because a rank without one would wait for ever.
    """
    return list(unmet(logs)) or [*deadlocks(logs), *not_awaited(logs)]


def not_replayed(logs: Mapping[int, Log]) -> dict[str, list[int]]:
    """The groups whose order cannot be replayed, each with its ranks that are missing in `logs`."""
    members = {name: ranks for log in logs.values() for name, ranks in log.members.items()}
    missing = {name: [rank for rank in ranks if rank not in logs] for name, ranks in members.items()}
    return {name: ranks for name, ranks in missing.items() if ranks}


# ------------------------------------------------------------ counterparts
def unmet(logs: Mapping[int, Log]) -> Iterator[str]:
    """Messages without a counterpart.

    Messages of a pair arrive in the order of sending, so the n-th send must match the n-th receive. All ranks of a
    group must call the same collectives in the same order.
    """
    for source, log in logs.items():
        for group, members in log.members.items():
            mine = log.events(group)
            for target in members:
                if target == source or target not in logs:
                    continue
                theirs = logs[target].events(group)
                yield from _pair(group, source, target, mine, theirs)
                if source < target:
                    yield from _collectives(group, source, target, mine, theirs)


def _pair(group: str, source: int, target: int, mine: list[Event], theirs: list[Event]) -> Iterator[str]:
    sends = [event for event in mine if event.kind == "send" and event.peer == target]
    receives = [event for event in theirs if event.kind == "recv" and event.peer == source]
    for number, (send, receive) in enumerate(zip(sends, receives, strict=False)):
        if (send.nbytes, send.dtype) != (receive.nbytes, receive.dtype):
            yield (
                f"{group}: rank {source} sends rank {target} {send} as message {number}, which receives {receive}"
            )
            return
    for event in _beyond(sends, receives):
        yield (
            f"{group}: rank {source} sends rank {target} {len(sends)} messages, which receives {len(receives)}; "
            f"nobody receives the one of {event}"
        )
    for event in _beyond(receives, sends):
        yield (
            f"{group}: rank {target} waits for {len(receives)} messages of rank {source}, which sends "
            f"{len(sends)}; nobody sends the one of {event}"
        )


def _beyond(longer: Sequence[Event], shorter: Sequence[Event]) -> Iterable[Event]:
    """The first event of `longer` that has no counterpart in `shorter`."""
    return longer[len(shorter) : len(shorter) + 1]


def _collectives(group: str, one: int, other: int, mine: list[Event], theirs: list[Event]) -> Iterator[str]:
    """The first collective in which two ranks of a group differ."""
    first, second = ([event for event in events if event.peer is None] for events in (mine, theirs))
    for number, (a, b) in enumerate(zip(first, second, strict=False)):
        if (a.kind, a.nbytes, a.dtype) != (b.kind, b.nbytes, b.dtype):
            yield (
                f"{group}: ranks {one} and {other} take part in different collectives, or in another order: "
                f"collective {number} is {a.kind} of {a} on rank {one}, {b.kind} of {b} on rank {other}"
            )
            return
    for event in (*_beyond(first, second), *_beyond(second, first)):
        yield (
            f"{group}: rank {one} takes part in {len(first)} collectives, rank {other} in {len(second)}; "
            f"one of them is missing in {event.kind} of {event}"
        )


def not_awaited(logs: Mapping[int, Log]) -> Iterator[str]:
    """For each rank the first receive that is never waited for: the rank may read data that has not arrived."""
    for rank, log in logs.items():
        awaited = {act.number for act in log.acts if isinstance(act, Wait)}
        for act in log.acts:
            if not isinstance(act, Start) or act.number in awaited:
                continue
            # Collectives are not checked, because a prefetch may be for a clip that does not come.
            received = [event for event in act.events if event.kind == "recv"]
            if received:
                yield f"{act.group}: rank {rank} never waits for the {received[0]} that it receives"
                break


# ------------------------------------------------------------ order
@dataclass
class _Rank:
    """The progress of a rank: its next act, each communicator's queue of starts, and the starts that are done.

    `open` has, for each queue, the events of its first start that have not met their counterpart yet.
    """

    acts: Sequence[Start | Wait]
    next: int = 0
    queues: dict[str, deque[Start]] = field(default_factory=dict)
    open: dict[str, list[Event]] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)

    def go_on(self, known: Mapping[str, object]) -> bool:
        """Do all acts before the next unfinished wait. Starts of groups that are not `known` are done at once."""
        before = self.next
        while self.next < len(self.acts):
            act = self.acts[self.next]
            if isinstance(act, Wait):
                if act.number not in self.done:
                    break
            elif act.group not in known:
                self.done.add(act.number)
            else:
                self.queues.setdefault(act.group, deque()).append(act)
                self.open.setdefault(act.group, list(act.events))
            self.next += 1
        return self.next > before

    def end(self, group: str) -> None:
        """Mark the first start in the queue of `group` as done."""
        queue = self.queues[group]
        self.done.add(queue.popleft().number)
        if queue:
            self.open[group] = list(queue[0].events)
        else:
            del self.open[group]

    @property
    def stuck_at(self) -> tuple[Wait | None, str] | None:
        """(wait that does not end, its group); the wait is None for a start without wait. None if all is done."""
        if self.next < len(self.acts):
            wait = self.acts[self.next]
            assert isinstance(wait, Wait)
            start = self.acts[wait.number]
            assert isinstance(start, Start)
            return wait, start.group
        return (None, next(iter(self.open))) if self.open else None


def deadlocks(logs: Mapping[int, Log]) -> Iterator[str]:
    """The circle of ranks that wait for each other, if the messages of `logs` do not end."""
    missing = not_replayed(logs)
    known = {
        name: members for log in logs.values() for name, members in log.members.items() if name not in missing
    }
    ranks = {rank: _Rank(log.acts) for rank, log in logs.items()}
    going = True
    while going:
        going = any([rank.go_on(known) for rank in ranks.values()])
        for group, members in known.items():
            while _move(group, {rank: ranks[rank] for rank in members}):
                going = True
    stuck = {number: rank for number, rank in ranks.items() if rank.stuck_at is not None}
    if stuck:
        yield _circle(stuck)


def _move(group: str, ranks: Mapping[int, _Rank]) -> bool:
    """Complete the messages within `group` whose both ranks have reached them; returns whether there were any."""
    first = {number: rank.open[group] for number, rank in ranks.items() if group in rank.open}
    kinds = {events[0].kind for events in first.values()}
    if len(first) == len(ranks) and len(kinds) == 1 and not kinds & {"send", "recv"}:
        for rank in ranks.values():
            rank.end(group)
        return True
    met = False
    for number, events in first.items():
        for send in [event for event in events if event.kind == "send"]:
            theirs = first.get(send.peer if send.peer is not None else -1, [])
            receive = next((e for e in theirs if e.kind == "recv" and e.peer == number), None)
            if receive is not None:
                events.remove(send)
                theirs.remove(receive)
                met = True
    for number, events in first.items():
        if not events:
            ranks[number].end(group)
    return met


def _circle(stuck: Mapping[int, _Rank]) -> str:
    """The text of a deadlock: for each rank of the circle, its line and what it waits for."""
    chain: list[int] = []
    words: dict[int, str] = {}
    number: int | None = min(stuck)
    while number is not None and number not in chain:
        chain.append(number)
        number, words[chain[-1]] = _waits_for(stuck, chain[-1])
    begins = chain.index(number) if number is not None else 0
    return f"a deadlock: {'; '.join(words[rank] for rank in chain[begins:])}"


def _waits_for(stuck: Mapping[int, _Rank], number: int) -> tuple[int | None, str]:
    """The rank for which rank `number` waits (None if it is not stuck too), and the text about this wait."""
    rank = stuck[number]
    assert rank.stuck_at is not None
    wait, group = rank.stuck_at
    start, events = rank.queues[group][0], rank.open[group]
    event = events[0]
    line = f"ends with {event.place.name}" if wait is None else f"waits at {wait.place.name} ({wait.place.text})"
    behind = "" if wait is None or start.number == wait.number else ", behind another message,"
    if event.peer is None:
        others = [
            other
            for other, theirs in stuck.items()
            if other != number and (group not in theirs.open or theirs.open[group][0].kind != event.kind)
        ]
        peer = others[0] if others else None
        what = f"{event.kind} of {event}, to which rank {peer} has not come"
    else:
        peer = event.peer
        what = f"rank {peer} to {'send' if event.kind == 'recv' else 'receive'} {event}"
    return (peer if peer in stuck else None), f"rank {number} {line}{behind} for {what} [{group}]"
