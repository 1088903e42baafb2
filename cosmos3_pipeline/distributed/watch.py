"""A thread that hears of the end of a run while this process waits for an accelerator, or is busy.

A message between accelerators does not fail by itself when its peer has gone, and whoever waits for the
accelerator hears nothing. So a thread looks at the board and at the connections, and when the run is over it
aborts the communicator, which ends every wait.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from torch._C._distributed_c10d import Store

from cosmos3_pipeline.distributed.board import PeerLost

# How often it looks.
LOOK_SECONDS = 0.2
# How often a rank tells the others how far it is.
TELL_SECONDS = 2.0


class Watch:
    """Looks until `stop`, or until `look` raises; then it keeps the error in `over` and calls `abort`.

    A message that this rank waits for during more than `patience` seconds ends the run too, with the name of the
    rank that has begun the fewest messages: each rank of `size` tells in `store` how many it has begun.
    """

    def __init__(
        self,
        look: Callable[[], None],
        abort: Callable[[], None],
        *,
        store: Store,
        rank: int,
        size: int,
        patience: float,
    ) -> None:
        self.over: Exception | None = None
        self._look, self._abort = look, abort
        self._store, self._rank, self._size = store, rank, size
        self._patience = patience
        self.begun = 0
        self._waits: tuple[float, Callable[[], bool]] = (0.0, lambda: True)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cosmos3-watch", daemon=True)
        self._thread.start()

    def waits_for(self, arrived: Callable[[], bool]) -> None:
        """Note that this rank, or its accelerator, waits from now on until `arrived`, which any thread may ask."""
        self._waits = time.monotonic(), arrived

    def check(self) -> None:
        """Raise what has ended the run."""
        if self.over is not None:
            raise self.over

    def stop(self) -> None:
        """Look no more; returns when the thread has ended."""
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        told, told_at = -1, 0.0
        while not self._stopped.wait(LOOK_SECONDS):
            try:
                self._look()
                if self.begun != told and time.monotonic() - told_at >= TELL_SECONDS:
                    told, told_at = self.begun, time.monotonic()
                    self._store.set(_key(self._rank), str(told))
                self._refuse_late()
            except Exception as error:  # whatever it is: nobody else is there to be told
                self.over = error
                self._abort()
                return

    def _refuse_late(self) -> None:
        since, arrived = self._waits
        seconds = time.monotonic() - since
        if seconds < self._patience or arrived():
            return
        begun = {rank: self._told(rank) for rank in range(self._size)} | {self._rank: self.begun}
        slowest = min(begun, key=lambda rank: begun[rank])
        raise PeerLost(
            what=f"a message of rank {self._rank} of {self._size} has not arrived for {seconds:.0f} s; rank "
            f"{slowest} has begun the fewest messages, {begun[slowest]} where this one has begun {self.begun}",
            why="that rank is stuck, or slower than any plan allows for",
            works="see what that rank does (py-spy dump shows where a process is), and its log",
        )

    def _told(self, rank: int) -> int:
        return int(self._store.get(_key(rank))) if self._store.check([_key(rank)]) else 0


def _key(rank: int) -> str:
    return f"begun/{rank}"
