"""Ranks as threads of one process. A message goes only when both ends are ready, as gloo's and NCCL's may."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from limits import HANGS
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class OtherRankFailed(RuntimeError):
    """Raised where a rank waits for a message of one that has raised."""


@dataclass
class _Half:
    """One end of a message. `tensor` is held until whoever made this end waits for it, as a transport would."""

    tensor: Tensor
    sends: bool
    done: threading.Event = field(default_factory=threading.Event)


class World:
    """The messages between `size` ranks, and what each rank has sent: [bytes, messages]."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.sent = [[0, 0] for _ in range(size)]
        self.failed = threading.Event()
        self._lock = threading.Lock()
        self._open: dict[tuple[int, int], deque[_Half]] = defaultdict(deque)
        self._shared: dict[int, Tensor] = {}
        self._barrier = threading.Barrier(size, timeout=HANGS)

    def post(self, source: int, target: int, tensor: Tensor, *, sends: bool) -> _Half:
        """One end of the next message from `source` to `target`; if the other is there, the message goes."""
        mine = _Half(tensor, sends)
        with self._lock:
            waiting = self._open[source, target]
            if not waiting or waiting[0].sends == sends:
                waiting.append(mine)
                return mine
            other = waiting.popleft()
            given, taken = (mine, other) if sends else (other, mine)
            same = given.tensor.shape == taken.tensor.shape and given.tensor.dtype == taken.tensor.dtype
            assert same, f"{given.tensor.shape} is sent by rank {source} to {target}, {taken.tensor.shape} awaited"
            # The other end's tensor is none of what this rank has made, so nobody who counts that may see it.
            with _disable_current_modes():
                taken.tensor.copy_(given.tensor)
            mine.done.set()
            other.done.set()
        return mine

    def broadcast(self, rank: int, tensor: Tensor) -> None:
        """Copy the tensor of rank 0 to all ranks."""
        if rank == 0:
            self._shared[0] = tensor
        self._barrier.wait()
        if rank:
            tensor.copy_(self._shared[0])
        self._barrier.wait()

    def fail(self) -> None:
        self.failed.set()
        self._barrier.abort()

    def without_counterpart(self) -> int:
        return sum(map(len, self._open.values()))


class ThreadComm:
    """The methods of `Comm` that a strategy's runner calls, between threads."""

    def __init__(self, world: World, rank: int) -> None:
        self.rank, self.size, self._world = rank, world.size, world

    @property
    def is_root(self) -> bool:
        return self.rank == 0

    def exchange(self, sends: Any = (), receives: Any = ()) -> _Pending:
        for tensor, _ in sends:
            self._count(tensor)
        out = [self._world.post(self.rank, peer, tensor, sends=True) for tensor, peer in sends]
        into = [self._world.post(peer, self.rank, tensor, sends=False) for tensor, peer in receives]
        return _Pending(self._world, out + into)

    pass_on = exchange

    def connect_pairs(self, pairs: Any) -> None: ...

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        assert source == 0
        if self.is_root and self.size > 1:
            self._count(tensor)
        self._world.broadcast(self.rank, tensor)

    def _count(self, tensor: Tensor) -> None:
        sent = self._world.sent[self.rank]
        sent[0] += tensor.nbytes
        sent[1] += 1


class _Pending:
    def __init__(self, world: World, halves: list[_Half]) -> None:
        self._world, self._halves = world, halves

    def wait(self) -> None:
        for half in self._halves:
            for _ in range(int(10 * HANGS)):
                if half.done.wait(0.1):
                    break
                if self._world.failed.is_set():
                    raise OtherRankFailed
            else:
                raise TimeoutError("nobody answers")
        self._halves = []


def run_on_threads(size: int, work: Callable[[Any], Any]) -> tuple[list[Any], World]:
    """`[work(comm) for each rank]`, and the messages between them. Raises what the first rank to fail raised."""
    world = World(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def rank(number: int) -> None:
        try:
            results[number] = work(ThreadComm(world, number))
        except BaseException as error:
            errors.append(error)
            world.fail()

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert not world.without_counterpart(), "some messages have one end only"
    return results, world
