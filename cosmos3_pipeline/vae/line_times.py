"""Times at which chunks leave the stages of a pipeline, if messages take no time. Imports no torch.

`clock` computes times for any assignment. This module computes one stage in microseconds, for the search for cuts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from cosmos3_pipeline.vae.costs import ChunkCosts
from cosmos3_pipeline.vae.program import Program

_OfChunk = tuple[float, int, float, int]  # see `LineTimes._seconds`


class LineTimes:
    """Computes when the portions of chunks leave the stages of a pipeline, in units of `costs`."""

    def __init__(self, program: Program, costs: ChunkCosts) -> None:
        self.program = program
        self._first, self._later = ([0.0, *accumulate(part)] for part in costs)
        self._known_first: dict[tuple[int, int], _OfChunk] = {}
        self._known_later: dict[tuple[int, int], _OfChunk] = {}

    def of_clip(self, chunks: int) -> float:
        """Time that one rank alone takes for a clip of `chunks` chunks."""
        return self._first[-1] + (chunks - 1) * self._later[-1]

    def before(self, cut: int) -> float:
        """Time of the ops before `cut`, for one chunk other than the first."""
        return self._later[cut]

    def departures(self, runs: Iterable[tuple[int, int]], arrivals: Sequence[float] | None = None) -> list[float]:
        """When each portion leaves a stage. `runs` has the ops [start, stop) of the stage on each chunk.

        Portions arrive at the stage at `arrivals`; None means that all have arrived at the start.
        """
        # The search calls this very often, so the loop makes few function calls.
        known, first = self._known_first, True
        coming = arrivals or ()
        now, leaving, at, count = 0.0, [], 0, len(coming)
        for run in runs:
            early, given, late, of_each = known.get(run) or self._seconds(run, first=first)
            for _ in range(given):
                if at < count and coming[at] > now:
                    now = coming[at]
                at += 1
                now += early
                for _ in range(of_each):
                    now += late
                    leaving.append(now)
            known, first = self._known_later, False
        return leaving

    def _seconds(self, run: tuple[int, int], *, first: bool) -> _OfChunk:
        """(early time, portions in, late time, portions out per portion in) of the ops `run` for one chunk.

        Early ops are those before `portions_from`, late ops are the others. Times are per portion.
        """
        start, stop = run
        sums, program = self._first if first else self._later, self.program
        early = max(start, min(stop, program.portions_from))
        given, left = (program.portions_at(cut, first=first) for cut in run)
        found = (sums[early] - sums[start]) / given, given, (sums[stop] - sums[early]) / left, left // given
        (self._known_first if first else self._known_later)[run] = found
        return found
