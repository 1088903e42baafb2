"""The error that a launcher raises when one of its ranks fails."""

from __future__ import annotations

from cosmos3_pipeline.errors import Portable


class RankFailed(Portable, RuntimeError):
    """A rank of a run raised or died, so the run is over. The text holds the traceback of this rank."""

    def __init__(self, rank: int, ranks: int, traceback: str) -> None:
        self.rank = rank
        self.traceback = traceback
        super().__init__(f"rank {rank} of {ranks} failed and the run was stopped:\n\n{traceback}")
