"""The board on which the ranks of a group tell each other why a run is over.

A rank that fails writes the reason to the store that all ranks share, and closes its connections. The messages of
its peers then fail. The peers read the reason from the board instead of reporting a broken connection.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from torch._C._distributed_c10d import Store

from cosmos3_pipeline.errors import Portable, Problem


class PeerError(Portable, RuntimeError):
    """A run ended on this rank because of another rank. `problem` says what happened, why, and what to do."""

    def __init__(self, *, what: str, why: str, works: str) -> None:
        self.problem = Problem(what=what, why=why, works=works)
        super().__init__(str(self.problem))


class PeerFailed(PeerError):
    """Another rank of the group failed, so this rank stopped. `rank` is the failed rank, numbered in the group."""

    def __init__(self, rank: int, reason: str) -> None:
        self.rank = rank
        super().__init__(
            what=f"rank {rank} of the group failed ({reason})",
            why="its part of the work is missing, so this rank stopped too",
            works=f"see rank {rank}'s own error",
        )


class PeerLost(PeerError):
    """The connection to another rank broke: the other process has died, or the network is down."""


class RunStopped(Exception):
    """Another rank ended the run early on purpose; nothing is wrong."""


@dataclass(frozen=True)
class Notice:
    """The entry on the board: `rank` ended the run because of `reason`, which is None when nothing is wrong.

    `lost` says that a rank has died, so that no further run is possible.
    """

    rank: int
    reason: str | None
    lost: bool = False


class Board:
    """Holds one notice per run, in a store of the group."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def post(self, run: int, notice: Notice) -> None:
        """Post `notice`, unless another rank has already posted one for this run."""
        try:
            text = json.dumps([notice.rank, notice.reason, notice.lost])
            self._store.compare_set(self._key(run), "", text)
        except RuntimeError:
            # The store died with the process that held it. Every rank notices this without a notice.
            return

    def raise_if_over(self, run: int) -> None:
        """Raise PeerFailed or RunStopped when another rank has ended the run, PeerLost when the store is gone."""
        try:
            if not self._store.check([self._key(run)]):
                return
            notice = Notice(*json.loads(self._store.get(self._key(run))))
        except RuntimeError as error:
            raise PeerLost(
                what=f"the store that the ranks share does not answer ({error})",
                why="the process that held it has died, so no rank can learn of the others",
                works="see the first error of the run",
            ) from error
        if notice.reason is None:
            raise RunStopped(f"rank {notice.rank} ended the run")
        if notice.lost:
            raise PeerLost(
                what=f"rank {notice.rank} of the group has found that another rank is gone: {notice.reason}",
                why="its part of the work is missing, and no other run of this group can follow",
                works="see the first rank that ended; the system kills a rank for which memory ran out",
            )
        raise PeerFailed(notice.rank, notice.reason)

    @staticmethod
    def _key(run: int) -> str:
        return f"over/{run}"
