"""Where the ranks of a group tell each other that a run is over, while they wait for each other's messages.

A rank that fails stops sending, and its peers would wait for it until a timeout of many minutes. So it writes
why to the store that all ranks share, and every waiting rank reads there a few times a second.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch._C._distributed_c10d import Store

T = TypeVar("T")


class PeerFailed(RuntimeError):
    """Another rank of the group failed, so this one stopped. `rank` is that rank, in the group."""

    def __init__(self, rank: int, reason: str) -> None:
        self.rank = rank
        super().__init__(
            f"rank {rank} of the group failed ({reason}); its part of the work is missing, so this rank stopped "
            f"too; see rank {rank}'s own error"
        )


class PeerLost(RuntimeError):
    """The connection to another rank broke: its process has died, or the network has."""


class RunStopped(Exception):
    """Another rank ended the run on purpose before its end; nothing is wrong."""


@dataclass(frozen=True)
class Notice:
    """What stands on the board: who ended the run, and why; `reason` is None when nothing is wrong."""

    rank: int
    reason: str | None


class Board:
    """The notice of each run of a group, in a store."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name

    def post(self, run: int, notice: Notice) -> None:
        """Put up `notice`, unless another rank was first."""
        try:
            text = json.dumps([notice.rank, notice.reason])
            self._store.compare_set(self._key(run), "", text)
        except RuntimeError:
            # The store died with the rank that held it, and then every rank sees that for itself.
            return

    def raise_if_over(self, run: int) -> None:
        """Raise PeerFailed or RunStopped when another rank has ended the run, PeerLost when the store is gone."""
        try:
            if not self._store.check([self._key(run)]):
                return
            rank, reason = json.loads(self._store.get(self._key(run)))
        except RuntimeError as error:
            raise PeerLost(
                f"the store that the ranks share does not answer ({error}); the process that held it has died, so "
                "no rank can learn of the others; see the first error of the run"
            ) from error
        if reason is None:
            raise RunStopped(f"rank {rank} ended the run")
        raise PeerFailed(rank, reason)

    def _key(self, run: int) -> str:
        return f"{self._name}/run{run}"


class Outcome(Generic[T]):
    """What a call in the waiter's thread gave, once `done`."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._result: list[T] = []
        self._error: BaseException | None = None
        self.done = threading.Event()

    def run(self) -> None:
        try:
            self._result.append(self._call())
        # Whatever the call raises belongs to the thread that asked for it.
        except BaseException as error:
            self._error = error
        self.done.set()

    def get(self) -> T:
        if self._error is not None:
            raise self._error
        return self._result[0]


class Waiter:
    """One thread that makes blocking calls, so that the thread that asked can look at the board meanwhile.

    A daemon: when a peer has died its call may never return, and must not keep the process alive.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Outcome[Any]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="cosmos3-waiter", daemon=True).start()

    def _serve(self) -> None:
        while True:
            self._calls.get().run()

    def submit(self, call: Callable[[], T]) -> Outcome[T]:
        outcome = Outcome(call)
        self._calls.put(outcome)
        return outcome
