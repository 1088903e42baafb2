"""Signs of life: a rank that is stopped or never starts is reported after a while, with its last known stage.

A rank that waits for a message cannot tell whether its peer is slow or will never send. Therefore a thread of each
rank increments a counter in the store that all ranks share, also while the rank computes. Rank 0 watches all other
ranks, and they watch rank 0.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import ClassVar

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from cosmos3_pipeline import stopping
from cosmos3_pipeline.errors import Problem

# A rank gives a sign, and reads the signs of others, every SIGN_SECONDS, but all ranks together give no more than
# RANKS_PER_SECOND signs per second.
SIGN_SECONDS, RANKS_PER_SECOND = 1.0, 128


def _tell(rank: int, problem: Problem) -> None:
    """Print the problem. Used when no launcher of this package collects the errors of ranks."""
    print(f"the run has stopped\n\n{problem}", file=sys.stderr, flush=True)


class Life:
    """Gives this rank's signs until `stop`, and ends this process if another rank gives none for `patience` s.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe the world. This process need not have joined it yet.
    """

    # Reports the end of the run: called with the silent rank and the problem.
    tell: ClassVar[Callable[[int, Problem], None]] = staticmethod(_tell)
    # The stage of the run in which this process is; sent with the signs.
    stage: ClassVar[str] = "start"

    def __init__(self, *, patience: float) -> None:
        self._rank, self._size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._patience = patience
        self._watched = [rank for rank in range(self._size) if rank != self._rank] if self._rank == 0 else [0]
        self._period = max(min(SIGN_SECONDS, patience / 4), self._size / RANKS_PER_SECOND)
        self._heard = dict.fromkeys(self._watched, time.monotonic())
        self._stages = dict.fromkeys(self._watched, "")
        self._stopped = threading.Event()
        # Two threads, because the store may not answer: the rank that keeps it may be stopped.
        self._threads = [
            threading.Thread(target=run, name=f"cosmos3-{run.__name__.strip('_')}", daemon=True)
            for run in (self._signs, self._judge)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Give no more signs, and no longer watch the signs of others."""
        self._stopped.set()

    def _signs(self) -> None:
        store = self._store()
        counts = dict.fromkeys(self._watched, 0)
        told = ""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        with suppress(RuntimeError):  # the store has gone; the other thread reports it later
            if store is not None:
                store.set(f"process/{self._rank}", str(os.getpid()))
            while store is not None and not self._stopped.is_set():
                if told != Life.stage:
                    told = Life.stage
                    store.set(f"stage/{self._rank}", told)
                store.add(f"sign/{self._rank}", 1)
                for rank in self._watched:
                    if (count := store.add(f"sign/{rank}", 0)) != counts[rank]:
                        counts[rank], self._heard[rank] = count, time.monotonic()
                        self._stages[rank] = store.get(f"stage/{rank}").decode()
                        if rank // here == self._rank // here:
                            stopping.neighbours[rank] = int(store.get(f"process/{rank}"))
                self._stopped.wait(self._period)

    def _store(self) -> Store | None:
        """A separate connection to the store, because this process may block in the world's one for long."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        with suppress(RuntimeError):  # the rank that keeps it never came; the other thread reports it
            store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=2 * self._patience))
            return PrefixStore(f"cosmos3/life/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        return None

    def _judge(self) -> None:
        looked = time.monotonic()
        while not self._stopped.wait(self._period):
            # If this process itself was stopped for a while, it has heard no signs in this time.
            asleep = max(0.0, time.monotonic() - looked - 2 * self._period)
            looked = time.monotonic()
            for rank in self._watched:
                self._heard[rank] += asleep
            silent = [rank for rank in self._watched if looked - self._heard[rank] > self._patience]
            if silent and not self._stopped.is_set():
                Life.tell(silent[0], self._problem(silent))
                # Kill silent ranks of this machine too, because a launcher would wait for stopped processes.
                stopping.end(1, [stopping.neighbours[rank] for rank in silent if rank in stopping.neighbours])

    def _problem(self, silent: list[int]) -> Problem:
        several, stage = len(silent) > 1, self._stages[silent[0]]
        named = f"rank{'s' * several} {', '.join(map(str, silent))} of {self._size}"
        gives = "give" if several else "gives"
        if not stage:
            what = f"{named} {'have' if several else 'has'} not come in {self._patience:g} s"
            why = f"rank {self._rank} cannot begin without; its process is stopped, or its machine not reached"
        else:
            what = f"{named} {gives} no sign of life for {self._patience:g} s, last heard of in stage {stage}"
            why = f"rank {self._rank} waits for what never comes; the process is stopped, or its machine has gone"
        return Problem(
            what=what,
            why=why,
            works="`ps` shows a stopped process with state T; topology.patience_seconds=N waits longer",
        )
