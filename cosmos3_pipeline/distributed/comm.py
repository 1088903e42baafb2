"""The one place that sends tensors between ranks: point-to-point, broadcast, gather; counted, and never hanging.

A `Comm` belongs to a group of ranks; ranks are numbered within it and rank 0 is the root. Backend-neutral: tensors
stay on their device (gloo on CPU, NCCL on CUDA), and agreement between ranks goes over gloo.

    with comm.run():            # on every rank of the group; ends together or fails together
        comm.agree(...)
        pending = comm.exchange(sends=[(tensor, 1)], receives=[(buffer, 1)])
        ...
        pending.wait()
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _get_default_store

from cosmos3_pipeline.distributed.board import Board, Notice, PeerFailed, PeerLost, RunStopped, Waiter
from cosmos3_pipeline.distributed.ledger import Ledger

T = TypeVar("T")

# Seconds between looks at the board while waiting for a message.
POLL_SECONDS = 0.1
# Seconds that a broken connection's rank gets to say why, before its loss is reported as such.
LAST_WORDS_SECONDS = 1.0


class Pending:
    """Messages under way. Their tensors must not be written (sends) or read (receives) before `wait` returns."""

    def __init__(self, comm: Comm, works: Sequence[dist.Work], tensors: Sequence[Tensor]) -> None:
        self._comm = comm
        self._works = list(works)
        self._tensors = list(tensors)

    def wait(self) -> None:
        """Return when all have arrived. Raises PeerFailed, PeerLost or RunStopped when they never will."""
        works, self._works = self._works, []
        on_cpu = all(t.device.type == "cpu" for t in self._tensors)
        for work in works:
            # On CUDA waiting only orders this thread's stream after the message, and must happen in this thread.
            if on_cpu:
                self._comm._blocking(work.wait)
            else:
                work.wait()
        self._tensors = []


class Comm:
    """Messages within a group (None: all ranks of an initialised `torch.distributed`, else one).

    Making one is collective over the group. With one rank nothing is sent. `ledger` counts this rank's messages.
    """

    def __init__(self, group: ProcessGroup | None = None, ledger: Ledger | None = None) -> None:
        self.ledger = Ledger() if ledger is None else ledger
        self.rank, self.size = 0, 1
        self._group: ProcessGroup | None = None
        self._board: Board | None = None
        self._run = 0
        self._broken = False
        self._lost: PeerLost | None = None
        if dist.is_available() and dist.is_initialized():
            self._ranks = dist.get_process_group_ranks(group)
            self._backend = str(dist.get_backend_config(group))
            if "gloo" not in self._backend:
                self._backend = f"cpu:gloo,cuda:{dist.get_backend(group)}"
            if len(self._ranks) > 1:
                self._connect()

    def _connect(self) -> None:
        """Make a process group of its own.

        Of its own, so that messages of a run that broke off in the middle are never received by a later one.
        """
        if self._lost is not None:
            raise self._lost
        # The old group, if there is one, is left as it is: destroying it would wait for its stray messages.
        own = dist.new_group(self._ranks, backend=self._backend, use_local_synchronization=True)
        self._group = own
        self.rank, self.size = own.rank(), own.size()
        self._board = Board(PrefixStore("cosmos3", _get_default_store()), own.group_name)
        self._waiter = Waiter()
        self._run = 0
        self._broken = False

    @property
    def is_root(self) -> bool:
        return self.rank == 0

    def _ready(self) -> None:
        if self._broken:
            self._connect()

    @contextmanager
    def run(self) -> Iterator[None]:
        """A stretch of messages that every rank of the group ends together.

        When the body raises on any rank, every rank raises: that one its own error, the others PeerFailed, within
        about a second of their next message. When the body is closed early (GeneratorExit) the others get
        RunStopped.
        """
        if self._board is None:
            yield
            return
        self._ready()
        self._run += 1
        self._broken = True  # until it has ended well: messages may be under way
        try:
            yield
            self._gather_objects(None)
        except (PeerFailed, RunStopped):
            raise
        except BaseException as error:
            if isinstance(error, PeerLost):
                self._lost = error
            reason = None if isinstance(error, GeneratorExit) else f"{type(error).__name__}: {error}"
            self._board.post(self._run, Notice(self.rank, reason))
            raise
        self._broken = False

    def agree(self, value: T) -> list[T]:
        """Every rank's `value`, by rank. Values must pickle; counted as control, not as payload."""
        if self._board is None:
            return [value]
        self._ready()
        return self._gather_objects(value)

    def _gather_objects(self, value: T) -> list[T]:
        self.ledger.record("control", 0)
        values: list[T | None] = [None] * self.size
        self._blocking(lambda: dist.all_gather_object(values, value, group=self._group))
        return values  # type: ignore[return-value]

    def exchange(
        self, sends: Sequence[tuple[Tensor, int]] = (), receives: Sequence[tuple[Tensor, int]] = ()
    ) -> Pending:
        """Start sending each tensor to its rank and receiving into each buffer from its rank.

        Tensors must be contiguous. Between two ranks messages arrive in the order in which they are sent.
        """
        if self._board is not None:
            self._board.raise_if_over(self._run)
        operations = []
        for kind, call, messages in (("recv", dist.irecv, receives), ("send", dist.isend, sends)):
            for tensor, peer in messages:
                self.ledger.record(kind, tensor.nbytes)
                operations.append(dist.P2POp(call, tensor, group=self._group, group_peer=peer))
        works = self._translated(lambda: dist.batch_isend_irecv(operations)) if operations else []
        return Pending(self, works, [tensor for tensor, _ in (*sends, *receives)])

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Overwrite `tensor` on every rank by that of rank `source`; same shape and dtype everywhere."""
        if self._group is None:
            return
        if self.rank == source:
            self.ledger.record("broadcast", tensor.nbytes)
        work = self._translated(lambda: dist.broadcast(tensor, group=self._group, group_src=source, async_op=True))
        assert work is not None
        Pending(self, [work], [tensor]).wait()

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's `tensor`, by rank; same shape and dtype everywhere."""
        if self._group is None:
            return [tensor]
        self.ledger.record("all_gather", tensor.nbytes)
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        work = self._translated(lambda: dist.all_gather(parts, tensor, group=self._group, async_op=True))
        assert work is not None
        Pending(self, [work], [*parts, tensor]).wait()
        return parts

    def _blocking(self, call: Callable[[], T]) -> T:
        """Make a call that waits for other ranks, and look at the board while it does."""
        assert self._board is not None
        outcome = self._waiter.submit(call)
        while not outcome.done.wait(POLL_SECONDS):
            self._board.raise_if_over(self._run)
        return self._translated(outcome.get)

    def _translated(self, call: Callable[[], T]) -> T:
        """The result of `call`; a connection error becomes the reason that the peer left, or PeerLost."""
        try:
            return call()
        except RuntimeError as error:
            assert self._board is not None
            deadline = time.monotonic() + LAST_WORDS_SECONDS
            while time.monotonic() < deadline:
                self._board.raise_if_over(self._run)
                time.sleep(POLL_SECONDS / 4)
            raise PeerLost(
                f"rank {self.rank} of {self.size} lost the connection to another rank ({error}); that process has "
                "died or the network is down, so the run cannot go on; look for the first rank that ended, or for "
                "memory that ran out"
            ) from error
