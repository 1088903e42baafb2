"""The one place that sends tensors between ranks: point-to-point, broadcast, gather; counted, and never hanging.

A `Comm` belongs to a group of ranks; ranks are numbered within it and rank 0 is the root. Tensors stay on their
device. Tensors on CPU, and the agreement between ranks, go through `links` on one machine, and through gloo
connections of its own between machines. Tensors on an accelerator go through a communicator of its own, while a
`watch` looks whether another rank has ended the run.

    with comm.run():            # on every rank of the group; ends together or fails together
        comm.agree(...)
        pending = comm.exchange(sends=[(tensor, 1)], receives=[(buffer, 1)])
        ...
        pending.wait()
"""

from __future__ import annotations

import pickle
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar
from weakref import WeakSet, finalize, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import ProcessGroup
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import _get_default_store

from cosmos3_pipeline.distributed.accelerator import AcceleratorGroup, Region, Work
from cosmos3_pipeline.distributed.board import Board, Notice, PeerError, PeerFailed, PeerLost, RunStopped
from cosmos3_pipeline.distributed.host_path import takes_host_path
from cosmos3_pipeline.distributed.ledger import Ledger
from cosmos3_pipeline.distributed.links import Links
from cosmos3_pipeline.distributed.watch import Watch
from cosmos3_pipeline.errors import Refusal

T = TypeVar("T")
Pair = tuple[int, int]  # the rank that sends and the one that receives

# Each kind of message on CPU has a lane of its own, which is also gloo's tag. So a rank that is out of step never
# takes payload for an agreement, and a collective passes messages that are still in flight.
_PAYLOAD, _AGREEMENT, _COLLECTIVE = 0, 1, 2

# Seconds that a broken connection's rank gets to say why, before its loss is reported as such.
LAST_WORDS_SECONDS = 1.0


class Pending:
    """Messages in flight. Their tensors must not be written (sends) or read (receives) before `wait` returns."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._works: list[Work] = []
        self._tensors: list[Tensor] = []
        self._landings: list[tuple[Tensor, Tensor]] = []

    def add(self, work: Work, tensors: Sequence[Tensor]) -> None:
        """Wait for `work` too, which needs the memory of `tensors`."""
        self._works.append(work)
        self._tensors += tensors

    def landing(self, tensor: Tensor) -> Tensor:
        """A contiguous tensor for what is received into `tensor`, which gets it in `wait`; itself without gaps."""
        if tensor.is_contiguous():
            return tensor
        landing = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        self._landings.append((tensor, landing))
        return landing

    def wait(self) -> None:
        """Return when all have arrived. Raises PeerFailed, PeerLost or RunStopped when they never will."""
        while self._works:
            self._comm._translated(self._works.pop(0).wait)
        for tensor, landing in self._landings:
            tensor.copy_(landing)
        self.drop()

    def drop(self) -> None:
        """Forget the messages: nobody will wait for them, and they no longer hold the connections open."""
        self._works.clear()
        self._tensors.clear()
        self._landings.clear()


_Start = Callable[[Sequence[Region], Sequence[Region]], list[Work]]


class Comm:
    """Messages within a group (None: all ranks of an initialised `torch.distributed`, else this process alone).

    Making one, and the first run after one that broke off, is collective over the group. With one rank nothing is
    sent. `ledger` counts this rank's messages. Tensors are those of `device`, or of the CPU. `patience` is how
    long a message may take, by default as long as PyTorch's.
    """

    def __init__(
        self,
        group: ProcessGroup | None = None,
        ledger: Ledger | None = None,
        *,
        device: torch.device | None = None,
        patience: timedelta = default_pg_timeout,
    ) -> None:
        self.ledger = Ledger() if ledger is None else ledger
        self._device = device or torch.device("cpu")
        self._patience = patience
        self._accelerator: AcceleratorGroup | None = None
        self._pairs: dict[Pair, AcceleratorGroup] = {}
        self._connected: set[Pair] = set()  # those of all ranks
        self._watch: Watch | None = None
        self.rank, self.size = 0, 1
        self._board: Board | None = None
        self._in_flight: WeakSet[Pending] = WeakSet()
        self._run = 0
        self._running = self._broken = False
        self._lost: PeerLost | None = None
        if dist.is_available() and dist.is_initialized():
            self._group = group or dist.group.WORLD
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            if self.size > 1:
                self._connect()

    def _connect(self) -> None:
        """Make connections of its own.

        Of its own, so that messages of a run that broke off in the middle are never received by a later one, and
        made directly: `new_group` names a group after all those that each process has made before, and processes
        that made different ones would wait for each other for ever.
        """
        if self._lost is not None:
            raise self._lost
        name = _unique_name(dist.get_process_group_ranks(self._group))
        store = PrefixStore(name, _get_default_store())
        # Any: PyTorch's stubs leave out the methods that every backend has.
        self._gloo: Any = dist.ProcessGroupGloo(store, self.rank, self.size, timeout=self._patience)
        self._links = Links(
            PrefixStore("links", store), self.rank, self.size, lanes=3, patience=self._patience.total_seconds()
        )
        self._board = Board(store)
        self._run = 0
        self._broken = False
        if not takes_host_path(self._device):
            self._connect_accelerator(store)

    def _connect_accelerator(self, store: PrefixStore) -> None:
        # A client of its own: in the other one this process may wait for long.
        other: Any = store
        other = other.clone()
        self._store = store
        # By weak references: a thread that held this Comm would keep it, and itself, for ever.
        mine, board = ref(self), Board(other)

        def look() -> None:
            if (comm := mine()) is not None:
                comm._look(board)

        def abort() -> None:
            if (comm := mine()) is not None:
                comm._abort()

        self._watch = Watch(
            look,
            abort,
            store=PrefixStore("watch", other),
            rank=self.rank,
            size=self.size,
            patience=self._patience.total_seconds(),
        )
        finalize(self, self._watch.stop)
        self._accelerator = self._new_group("all", range(self.size))

    def _new_group(self, name: str, members: Sequence[int]) -> AcceleratorGroup:
        assert self._watch is not None
        return AcceleratorGroup(
            PrefixStore(name, self._store),
            members.index(self.rank),
            members,
            device=self._device,
            patience=2 * self._patience,  # the watch is first, and says whose fault it is
            watch=self._watch,
        )

    def connect_pairs(self, pairs: Iterable[Pair]) -> None:
        """Make what `pass_on` needs for messages of these pairs of ranks; all ranks of the group call it together.

        Between accelerators each pair has a communicator of its own. One for all would do one message after the
        other in the order in which each rank asks for them: two ranks that each send before they receive would
        wait for each other, and what arrives for a later chunk would hold up what leaves.
        """
        missing = sorted(set(pairs) - self._connected)
        if not missing or takes_host_path(self._device):
            return
        # Whoever has failed by now is not waited for below, where nobody would hear of it.
        self.agree(missing)
        self._connected |= set(missing)
        for pair in missing:  # in one order, because both ranks of a pair wait for each other here
            if self.rank in pair:
                self._translated(partial(self._connect_pair, pair))
        if self._watch is not None:
            self._translated(self._watch.check)  # it has aborted those that were there then

    def _connect_pair(self, pair: Pair) -> None:
        if self._accelerator is not None:
            self._pairs[pair] = self._new_group("-".join(map(str, pair)), pair)

    def _look(self, board: Board) -> None:
        """Raise when another rank has ended the run, or has died on this machine. The watch's thread calls it."""
        board.raise_if_over(self._run)
        self._links.raise_if_broken()

    def _abort(self) -> None:
        for group in self._groups():
            group.abort()

    def _groups(self) -> list[AcceleratorGroup]:
        return [*self._pairs.values(), *([self._accelerator] if self._accelerator is not None else [])]

    def _close(self) -> None:
        """Close the connections, which ends the waiting of every rank that waits for this one."""
        if self._watch is not None:
            self._watch.stop()
            self._abort()
            self._watch = self._accelerator = None
            self._pairs.clear()
            self._connected.clear()
        self._links.close()
        for pending in self._in_flight:
            pending.drop()
        self._gloo = None

    def close(self) -> None:
        """Close the connections for good, once no rank of the group waits for another; each rank by itself."""
        if self._board is None or self._broken:
            return
        if self._watch is not None:
            self._watch.stop()  # first: peers that are gone by now are no reason to abort
        for group in self._groups():
            group.shutdown()
        self._accelerator = None
        self._pairs.clear()
        self._close()
        self._broken = True

    @property
    def is_root(self) -> bool:
        return self.rank == 0

    def _ready(self) -> None:
        if self._broken:
            self._close()  # again, unless the run was left in the middle
            self._connect()

    @contextmanager
    def run(self) -> Iterator[None]:
        """A stretch of messages that every rank of the group ends together.

        When the body raises on any rank, every rank raises: that one its own error, the others PeerFailed at
        their next message. When the body is closed early (GeneratorExit) the others get RunStopped.
        """
        if self._board is None:
            yield
            return
        if self._running:
            self._broken = True  # one was left in the middle: its messages may be in flight
        self._ready()
        self._run += 1
        self._running = True
        try:
            yield
            if self._accelerator is not None:
                # Whoever agrees that the run has ended has computed and received all of it.
                self._accelerator.synchronize()
            self._gather_objects(None)
        except BaseException as error:
            self._running, self._broken = False, True
            if isinstance(error, PeerLost):
                self._lost = error
            if not isinstance(error, PeerFailed | RunStopped):
                lost = isinstance(error, PeerLost)
                words = error.problem.what if isinstance(error, PeerLost) else f"{type(error).__name__}: {error}"
                reason = None if isinstance(error, GeneratorExit) else words
                self._board.post(self._run, Notice(self.rank, reason, lost))
            self._close()
            raise
        self._running = False

    def agree(self, value: T) -> list[T]:
        """Every rank's `value`, by rank. Values must pickle; counted as control, not as payload."""
        if self._board is None:
            return [value]
        self._ready()
        return self._gather_objects(value)

    def _gather_objects(self, value: T) -> list[T]:
        self.ledger.record("control", 0)
        mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = self._gather(torch.tensor([len(mine)]), [[1]] * self.size, _AGREEMENT)
        parts = self._gather(mine, [[int(size)] for size in sizes], _AGREEMENT)
        return [pickle.loads(part.numpy().tobytes()) for part in parts]

    def _gather(self, mine: Tensor, shapes: Sequence[Sequence[int]], lane: int) -> list[Tensor]:
        """Every rank's tensor on CPU, which have `shapes`.

        Each rank sends to each other one: between ranks of one machine that is quicker than gloo's collective.
        """
        parts = [mine if rank == self.rank else mine.new_empty(shape) for rank, shape in enumerate(shapes)]
        others = [rank for rank in range(self.size) if rank != self.rank]
        sends, receives = [(mine, rank) for rank in others], [(parts[rank], rank) for rank in others]
        self._exchange_on_cpu(sends, receives, lane).wait()
        return parts

    def exchange(self, sends: Sequence[Region] = (), receives: Sequence[Region] = ()) -> Pending:
        """Start sending each tensor to its rank and receiving into each buffer from its rank.

        They may have any strides. Between two ranks messages arrive in the order in which they are sent.
        """
        return self._exchange(sends, receives, self._start_batch)

    def pass_on(self, sends: Sequence[Region] = (), receives: Sequence[Region] = ()) -> Pending:
        """As `exchange`, for messages of which the other end sends or receives when it comes to it.

        Ranks that do not take part in it at the same point wait for nothing but the messages of their own pair.
        `connect_pairs` comes first. A message between two ranks goes one of the two ways throughout.
        """
        return self._exchange(sends, receives, self._start_in_pairs)

    def _exchange(self, sends: Sequence[Region], receives: Sequence[Region], start: _Start) -> Pending:
        if not sends and not receives:
            return Pending(self)
        assert self._board is not None, "a Comm of one rank has nobody to exchange with"
        for kind, messages in (("recv", receives), ("send", sends)):
            for tensor, _ in messages:
                self.ledger.record(kind, tensor.nbytes)
        if _all_on_host(*(tensor for tensor, _ in (*sends, *receives))):
            return self._exchange_on_cpu(sends, receives, _PAYLOAD)
        pending = self._pending()
        landings = [(pending.landing(tensor), peer) for tensor, peer in receives]
        leaving = [(tensor.contiguous(), peer) for tensor, peer in sends]
        tensors = [tensor for tensor, _ in (*landings, *leaving)]
        return self._started(pending, partial(start, landings, leaving), tensors)

    def _start_in_pairs(self, landings: Sequence[Region], leaving: Sequence[Region]) -> list[Work]:
        works: list[Work] = []
        for peer in sorted({peer for _, peer in landings}):
            works += self._start_pair((peer, self.rank), [tensor for tensor, p in landings if p == peer])
        for peer in sorted({peer for _, peer in leaving}):
            works += self._start_pair((self.rank, peer), [tensor for tensor, p in leaving if p == peer])
        return works

    def _started(self, pending: Pending, start: Callable[[], list[Work]], tensors: Sequence[Tensor]) -> Pending:
        """Start messages between accelerators, and wait for them in `pending`."""
        if self._watch is not None:
            self._translated(self._watch.check)
        for work in self._translated(start):
            pending.add(work, tensors)
        return pending

    # What an accelerator's group is asked for, and nothing else: a rehearsal has others in their place.
    def _start_batch(self, landings: Sequence[Region], leaving: Sequence[Region]) -> list[Work]:
        return self._between_accelerators().batch(landings, leaving)

    def _start_pair(self, pair: Pair, tensors: Sequence[Tensor]) -> list[Work]:
        assert pair in self._pairs, f"connect_pairs() has not named the messages of {pair}"
        if pair[0] == self.rank:
            return self._pairs[pair].batch([], [(tensor, 1) for tensor in tensors])
        return self._pairs[pair].batch([(tensor, 0) for tensor in tensors], [])

    def _start_broadcast(self, tensor: Tensor, source: int) -> Work:
        return self._between_accelerators().broadcast(tensor, source)

    def _start_all_gather(self, parts: list[Tensor], tensor: Tensor) -> Work:
        return self._between_accelerators().all_gather(parts, tensor)

    def _start_gather_into(self, whole: Tensor, own: Tensor) -> Work:
        return self._between_accelerators().gather_into(whole, own)

    def _between_accelerators(self) -> AcceleratorGroup:
        assert self._accelerator is not None, f"this Comm was made for {self._device}"
        return self._accelerator

    def _exchange_on_cpu(self, sends: Sequence[Region], receives: Sequence[Region], lane: int) -> Pending:
        pending, by_gloo = self._pending(), list[tuple[Work, Tensor]]()
        # Sends first, because others wait for what leaves while this rank prepares its own receives.
        for tensor, peer in sends:
            leaving = tensor.contiguous()
            if peer in self._links:
                pending.add(self._translated(partial(self._links.send, leaving, peer, lane)), [])
            else:
                by_gloo.append((self._translated(partial(self._gloo.send, [leaving], peer, lane)), leaving))
        for tensor, peer in receives:
            landing = pending.landing(tensor)
            if peer in self._links:
                pending.add(self._links.receive(landing, peer, lane), [])
            else:
                by_gloo.append((self._translated(partial(self._gloo.recv, [landing], peer, lane)), landing))
        # Last, because a rank that sits in gloo's wait moves nothing for the ranks of its own machine.
        for work, tensor in by_gloo:
            pending.add(work, [tensor])
        return pending

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Overwrite `tensor` on every rank by that of rank `source`; same shape and dtype everywhere.

        On CPU the source sends to each other rank: on one machine that is quicker than gloo's collective. Raises
        Refusal, a ValueError, for a tensor that is not contiguous.
        """
        _check_contiguous(tensor)
        if self._board is None:
            return
        gives = self.rank == source
        if gives:
            self.ledger.record("broadcast", tensor.nbytes)
        if _all_on_host(tensor):
            sends = [(tensor, peer) for peer in range(self.size) if gives and peer != source]
            receives = [] if gives else [(tensor, source)]
            self._exchange_on_cpu(sends, receives, _COLLECTIVE).wait()
            return
        self._started(self._pending(), lambda: [self._start_broadcast(tensor, source)], [tensor]).wait()

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's `tensor`, by rank; same shape and dtype everywhere."""
        if self._board is None:
            return [tensor]
        self.ledger.record("all_gather", tensor.nbytes)
        if _all_on_host(tensor):
            return self._gather(tensor.clone(), [tensor.shape] * self.size, _COLLECTIVE)
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        start = partial(self._start_all_gather, parts, tensor)
        self._started(self._pending(), lambda: [start()], [*parts, tensor]).wait()
        return parts

    def gather_into(self, whole: Tensor, own: Tensor) -> Pending:
        """Start to gather every rank's `own` [n] into `whole` [ranks x n], by rank; all are contiguous.

        Counted as what it takes from point to point, each rank sending its own to each other.
        """
        parts = whole.split(len(own))
        others = [rank for rank in range(self.size) if rank != self.rank]
        if not others or _all_on_host(whole, own):
            parts[self.rank].copy_(own)
            return self.exchange([(own, rank) for rank in others], [(parts[rank], rank) for rank in others])
        for rank in others:
            self.ledger.record("send", own.nbytes)
            self.ledger.record("recv", parts[rank].nbytes)
        return self._started(self._pending(), lambda: [self._start_gather_into(whole, own)], [whole, own])

    def _pending(self) -> Pending:
        pending = Pending(self)
        self._in_flight.add(pending)
        return pending

    def _translated(self, call: Callable[[], T]) -> T:
        """The result of `call`; a connection error becomes the reason that the peer left, or PeerLost.

        Nothing that allocates belongs into `call`: to run out of memory is a RuntimeError as well.
        """
        try:
            return call()
        except PeerError:
            raise
        except RuntimeError as error:
            assert self._board is not None
            deadline = time.monotonic() + LAST_WORDS_SECONDS
            while time.monotonic() < deadline:
                self._board.raise_if_over(self._run)
                time.sleep(LAST_WORDS_SECONDS / 20)
            raise PeerLost(
                what=f"rank {self.rank} of {self.size} lost the connection to another rank ({_words(error)})",
                why="that process has died or the network is down, so the run cannot go on",
                works="see the first rank that ended; the system kills a rank for which memory ran out",
            ) from error


def _words(error: RuntimeError) -> str:
    """What a connection's error says, without where in gloo's sources it was raised."""
    return re.sub(r"^\[\S*gloo\S*\]\s*|\.? GLHF!.*$", "", str(error), flags=re.DOTALL)


def _check_contiguous(tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise Refusal(
            what=f"a broadcast of a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()}",
            why="its bytes do not lie side by side",
            works="give tensor.contiguous(), and on the other ranks a buffer of its own",
        )


def _all_on_host(*tensors: Tensor) -> bool:
    return all(map(takes_host_path, tensors))


_made: dict[tuple[int, ...], int] = {}


def _unique_name(ranks: Sequence[int]) -> str:
    """A name for connections between `ranks`, the same on all of them, and never given before."""
    key = tuple(ranks)
    _made[key] = _made.get(key, 0) + 1
    return f"cosmos3/{'-'.join(map(str, key))}/{_made[key]}"
