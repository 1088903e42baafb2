"""What a broken world looks like to whoever started it."""

from __future__ import annotations

from cosmos3_pipeline.errors import Portable


class RankFailed(Portable, RuntimeError):
    """A rank of a run raised or died; the run is over. The text holds that rank's own traceback."""

    def __init__(self, rank: int, ranks: int, traceback: str) -> None:
        self.rank = rank
        self.traceback = traceback
        super().__init__(f"rank {rank} of {ranks} failed and the run was stopped:\n\n{traceback}")
