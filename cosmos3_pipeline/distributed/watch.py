"""A thread that notices the end of a run while this process waits for an accelerator, or is busy.

A message between accelerators does not fail when its peer has gone, and a process that waits for the accelerator
notices nothing. Therefore a thread checks the board and the connections. When the run is over, the thread aborts
the communicator, which ends every wait.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence

from torch._C._distributed_c10d import Store

from cosmos3_pipeline.distributed.board import PeerLost

# Interval between two checks of the board and the connections.
LOOK_SECONDS = 0.2
# Shortest time between two writes of the list of ranks for which this rank waits.
TELL_SECONDS = 1.0


class Watch:
    """Calls `look` repeatedly until `stop`. If `look` raises, keeps the error in `over` and calls `abort`.

    The run also ends if this rank waits longer than `patience` seconds for a message. The error then names the
    rank to blame. For this purpose each of the `size` ranks writes to `store` for whom it waits: the rank to blame
    waits for nobody.
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
        self._waits: tuple[float, Callable[[], bool], Sequence[int]] = (0.0, lambda: True, ())
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cosmos3-watch", daemon=True)
        self._thread.start()

    def waits_for(self, arrived: Callable[[], bool], peers: Sequence[int]) -> None:
        """Note that this rank or its accelerator waits for `peers` until `arrived()`; any thread may call that."""
        self._waits = time.monotonic(), arrived, peers

    def check(self) -> None:
        """Raise the error that has ended the run, if there is one."""
        if self.over is not None:
            raise self.over

    def stop(self) -> None:
        """Stop checking. Returns when the thread has ended."""
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        told: tuple[int, ...] = ()
        told_at = 0.0
        while not self._stopped.wait(LOOK_SECONDS):
            try:
                self._look()
                _, arrived, peers = self._waits
                now = () if arrived() else tuple(peers)
                if now != told and time.monotonic() - told_at >= TELL_SECONDS:
                    told, told_at = now, time.monotonic()
                    self._store.set(_key(self._rank), json.dumps(told))
                self._refuse_late()
            except Exception as error:  # any error, because no caller of this thread could handle it
                self.over = error
                self._abort()
                return

    def _refuse_late(self) -> None:
        since, arrived, peers = self._waits
        seconds = time.monotonic() - since
        if seconds < self._patience or arrived():
            return
        stuck = self._who_waits_for_nobody(peers)
        raise PeerLost(
            what=f"rank {self._rank} of {self._size} has waited for rank {' and '.join(map(str, peers))} for "
            f"{seconds:.0f} s; "
            + ("all of these ranks wait for each other" if stuck is None else f"rank {stuck} waits for nobody"),
            why="it is stuck, or slower than any plan allows for"
            if stuck is not None
            else "their messages are started in orders that do not fit together",
            works="see what it does (py-spy dump shows where a process is), and its log"
            if stuck is not None
            else "job=rehearse with the same settings, which replays the order",
        )

    def _who_waits_for_nobody(self, peers: Sequence[int]) -> int | None:
        """The first rank that waits for nobody, along the chain of waits from `peers`; None if it is a circle."""
        waiting, seen = list(peers), {self._rank}
        while waiting:
            rank = waiting.pop(0)
            if rank in seen:
                continue
            seen.add(rank)
            theirs = self._told(rank)
            if not theirs:
                return rank
            waiting += theirs
        return None

    def _told(self, rank: int) -> list[int]:
        found: list[int] = json.loads(self._store.get(_key(rank))) if self._store.check([_key(rank)]) else []
        return found


def _key(rank: int) -> str:
    return f"waits/{rank}"
