"""Signs of life: a rank that is stopped, or never comes, is named after a while, and with it where it was.

A rank that waits for another one's message cannot tell a slow peer from one that will never send. So a thread of
each rank counts up in the store that all ranks share, also while the rank computes. Rank 0 looks after all others,
and they look after rank 0.
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

# How often a rank gives a sign, and looks for those of others; less often where there are very many.
SIGN_SECONDS, RANKS_PER_SECOND = 1.0, 128


def _tell(rank: int, problem: Problem) -> None:
    """On the terminal, where no launcher of ours collects what ends a rank."""
    print(f"the run has stopped\n\n{problem}", file=sys.stderr, flush=True)


class Life:
    """Gives this rank's signs until `stop`, and ends this process when another rank gives none for `patience` s.

    The world is the one that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe. It need not be joined yet.
    """

    # How the end of the run is told: the rank that is silent, and the three parts.
    tell: ClassVar[Callable[[int, Problem], None]] = staticmethod(_tell)
    # The stage of a run that this process is in; told with the signs.
    stage: ClassVar[str] = "start"

    def __init__(self, *, patience: float) -> None:
        self._rank, self._size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._patience = patience
        self._watched = [rank for rank in range(self._size) if rank != self._rank] if self._rank == 0 else [0]
        self._period = max(min(SIGN_SECONDS, patience / 4), self._size / RANKS_PER_SECOND)
        self._heard = dict.fromkeys(self._watched, time.monotonic())
        self._stages = dict.fromkeys(self._watched, "")
        self._stopped = threading.Event()
        # Two, because the store may be what does not answer: it may be kept by a rank that is stopped.
        self._threads = [
            threading.Thread(target=run, name=f"cosmos3-{run.__name__.strip('_')}", daemon=True)
            for run in (self._signs, self._judge)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Give no more signs, and miss none."""
        self._stopped.set()

    def _signs(self) -> None:
        store = self._store()
        counts = dict.fromkeys(self._watched, 0)
        told = ""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        with suppress(RuntimeError):  # the store has gone: the other thread says so in time
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
        """A connection of its own: in that of the world this process may wait for long."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        with suppress(RuntimeError):  # nobody has come who keeps it: the other thread says so
            store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=2 * self._patience))
            return PrefixStore(f"cosmos3/life/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        return None

    def _judge(self) -> None:
        looked = time.monotonic()
        while not self._stopped.wait(self._period):
            # Where this process was stopped itself, with the others or alone, it has heard nobody meanwhile.
            asleep = max(0.0, time.monotonic() - looked - 2 * self._period)
            looked = time.monotonic()
            for rank in self._watched:
                self._heard[rank] += asleep
            silent = [rank for rank in self._watched if looked - self._heard[rank] > self._patience]
            if silent and not self._stopped.is_set():
                Life.tell(silent[0], self._problem(silent))
                # A launcher that asks a stopped process to end would wait for it.
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
