"""The only module that sends tensors between ranks: point-to-point, broadcast, gather. Counted; never hangs.

A `Comm` belongs to a group of ranks; ranks are numbered within the group, and rank 0 is the root. Tensors stay on
their device. Tensors on CPU, and the agreement between ranks, are sent through `links` within a machine, and
through gloo between machines. Tensors on an accelerator are sent through an `AcceleratorGroup`, while a `watch`
checks whether another rank has ended the run. No connection is shared between two Comms.

    with comm.run():            # on every rank of the group: all ranks end together or fail together
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
Pair = tuple[int, int]  # (sending rank, receiving rank)

# Each kind of message on CPU has its own lane, whose number is also gloo's tag. A rank that is out of step
# therefore never mistakes payload for an agreement, and a collective can overtake messages that are still in
# flight.
_PAYLOAD, _AGREEMENT, _COLLECTIVE = 0, 1, 2

# After a connection broke, its peer has this long to post a reason, before the peer is reported as lost.
LAST_WORDS_SECONDS = 1.0


class Pending:
    """Messages in flight. Before `wait` returns, sent tensors must not be written and received ones not read."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._works: list[Work] = []
        self._tensors: list[Tensor] = []
        self._landings: list[tuple[Tensor, Tensor]] = []

    def add(self, work: Work, tensors: Sequence[Tensor]) -> None:
        """Let `wait` also wait for `work`, and keep `tensors` alive until then."""
        self._works.append(work)
        self._tensors += tensors

    def landing(self, tensor: Tensor) -> Tensor:
        """A buffer to receive into: `tensor` if contiguous, else a new buffer that `wait` copies to `tensor`."""
        if tensor.is_contiguous():
            return tensor
        landing = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        self._landings.append((tensor, landing))
        return landing

    def wait(self) -> None:
        """Return when all messages have arrived. Raises PeerFailed, PeerLost or RunStopped if they never can."""
        while self._works:
            self._comm._translated(self._works.pop(0).wait)
        for tensor, landing in self._landings:
            tensor.copy_(landing)
        self.drop()

    def drop(self) -> None:
        """Forget the messages. Nobody can wait for them after this, and they no longer keep connections open."""
        self._works.clear()
        self._tensors.clear()
        self._landings.clear()


_Start = Callable[[Sequence[Region], Sequence[Region]], list[Work]]


class Comm:
    """Messages within a group (None: all ranks of an initialised `torch.distributed`, else this process alone).

    The constructor is collective over the group, and so is the first run after a failed run. With one rank nothing
    is sent. `ledger` counts this rank's messages. Tensors must be on `device` or on CPU. `patience` is how long a
    message may take; the default is PyTorch's.
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
        self._connected: set[Pair] = set()  # pairs of all ranks, not only of this rank
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
        """Create new connections for this Comm.

        They are new, so that a later run never receives messages of a run that failed in the middle. They are not
        made with `torch.distributed.new_group`, because it numbers groups by how many a process has made before:
        processes that made different numbers of groups would wait for each other for ever.
        """
        if self._lost is not None:
            raise self._lost
        name = _unique_name(dist.get_process_group_ranks(self._group))
        store = PrefixStore(name, _get_default_store())
        # Any, because PyTorch's type stubs lack the methods that every backend has.
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
        # The watch gets its own client of the store, because this process may block in the other client for long.
        other: Any = store
        other = other.clone()
        self._store = store
        # A weak reference, because the watch's thread would otherwise keep this Comm, and itself, alive for ever.
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
            patience=2 * self._patience,  # longer than the watch's, which can name the rank to blame
            watch=self._watch,
        )

    def connect_pairs(self, pairs: Iterable[Pair]) -> None:
        """Create the connections that `pass_on` needs for `pairs`; all ranks of the group call it together.

        Between accelerators each pair has its own communicator, because a shared communicator runs messages one by
        one in the order of each rank's calls. Two ranks that both send before they receive would then deadlock,
        and a receive for a later chunk would delay a send.
        """
        missing = sorted(set(pairs) - self._connected)
        if not missing or takes_host_path(self._device):
            return
        # This raises if a rank has already failed. The waits below could not notice that.
        self.agree(missing)
        self._connected |= set(missing)
        for pair in missing:  # in the same order on all ranks, because both ranks of a pair wait for each other
            if self.rank in pair:
                self._translated(partial(self._connect_pair, pair))
        if self._watch is not None:
            self._translated(self._watch.check)  # an abort before now did not reach the groups made above

    def _connect_pair(self, pair: Pair) -> None:
        if self._accelerator is not None:
            self._pairs[pair] = self._new_group("-".join(map(str, pair)), pair)

    def _look(self, board: Board) -> None:
        """Raise if another rank has ended the run, or a rank on this machine has died. Called by the watch."""
        board.raise_if_over(self._run)
        self._links.raise_if_broken()

    def _abort(self) -> None:
        for group in self._groups():
            group.abort()

    def _groups(self) -> list[AcceleratorGroup]:
        return [*self._pairs.values(), *([self._accelerator] if self._accelerator is not None else [])]

    def _close(self) -> None:
        """Close the connections. This ends the wait of every rank that waits for this rank."""
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
        """Close the connections for good. Not collective, but no rank may still wait for another."""
        if self._board is None or self._broken:
            return
        if self._watch is not None:
            self._watch.stop()  # first, so that peers that have already left cause no abort
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
            self._close()  # not yet done if the run was left in the middle
            self._connect()

    @contextmanager
    def run(self) -> Iterator[None]:
        """A block of code with messages, which all ranks of the group leave together.

        If the body raises on one rank, this rank raises its error, and every other rank raises PeerFailed at its
        next message. If the body is closed early (GeneratorExit), the other ranks raise RunStopped.
        """
        if self._board is None:
            yield
            return
        if self._running:
            self._broken = True  # the last run was left in the middle, so its messages may still be in flight
        self._ready()
        self._run += 1
        self._running = True
        try:
            yield
            if self._accelerator is not None:
                # A rank agrees to the end of a run only after it has computed and received everything.
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
        """Gather every rank's `value`, in rank order. Values are pickled, and count as control, not as payload."""
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
        """Gather every rank's CPU tensor; `shapes` has the shape on each rank.

        Each rank sends to each other rank, because this is faster than gloo's collective within one machine.
        """
        parts = [mine if rank == self.rank else mine.new_empty(shape) for rank, shape in enumerate(shapes)]
        others = [rank for rank in range(self.size) if rank != self.rank]
        sends, receives = [(mine, rank) for rank in others], [(parts[rank], rank) for rank in others]
        self._exchange_on_cpu(sends, receives, lane).wait()
        return parts

    def exchange(self, sends: Sequence[Region] = (), receives: Sequence[Region] = ()) -> Pending:
        """Start sending each tensor to its rank and receiving into each buffer from its rank.

        Tensors and buffers may have any strides. Messages from one rank to another arrive in the order of sending.
        """
        return self._exchange(sends, receives, self._start_batch)

    def pass_on(self, sends: Sequence[Region] = (), receives: Sequence[Region] = ()) -> Pending:
        """As `exchange`, but the other end may start its side of a message at any later time.

        A rank waits only for the messages of its own pairs. `connect_pairs` must have named these pairs. Both ends
        of a message must use `pass_on`, or both `exchange`.
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
        """Start messages between accelerators, and add them to `pending`."""
        if self._watch is not None:
            self._translated(self._watch.check)
        for work in self._translated(start):
            pending.add(work, tensors)
        return pending

    # The next methods have all calls of an accelerator's group. A rehearsal replaces these methods.
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
        # Sends first, because other ranks may wait for them while this rank prepares its receives.
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
        # gloo last, because a rank that blocks in gloo's wait moves no messages of the links on its machine.
        for work, tensor in by_gloo:
            pending.add(work, [tensor])
        return pending

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Overwrite `tensor` on every rank with the tensor of rank `source`; same shape and dtype everywhere.

        On CPU the source sends to each other rank, because this is faster than gloo's collective within one
        machine. Raises Refusal, a ValueError, for a tensor that is not contiguous.
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
        """Gather every rank's `tensor`, in rank order; same shape and dtype everywhere."""
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
        """Start to gather every rank's `own` [n] into `whole` [ranks x n], in rank order; both are contiguous.

        The ledger counts point-to-point messages: each rank sends `own` to each other rank.
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
        """The result of `call`; raises PeerError or RunStopped instead of a connection's RuntimeError.

        The reason is the peer's notice on the board; without a notice it is PeerLost. `call` must not allocate
        memory, because running out of memory is also a RuntimeError.
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
    """The text of a connection error, without its location in gloo's sources."""
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
    """A new name for connections between `ranks`; all of these ranks get the same name."""
    key = tuple(ranks)
    _made[key] = _made.get(key, 0) + 1
    return f"cosmos3/{'-'.join(map(str, key))}/{_made[key]}"
