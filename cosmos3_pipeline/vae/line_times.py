"""When chunks pass a line of stages, each with a run of ops, if messages take no time. No torch here.

The clock says it for any assignment; this says it for one stage in microseconds, for those who look for cuts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from cosmos3_pipeline.vae.costs import ChunkCosts
from cosmos3_pipeline.vae.program import Program

_OfChunk = tuple[float, int, float, int]  # see `LineTimes._seconds`


class LineTimes:
    """When the portions of chunks leave the stages of a line. In units of `costs`."""

    def __init__(self, program: Program, costs: ChunkCosts) -> None:
        self.program = program
        self._first, self._later = ([0.0, *accumulate(part)] for part in costs)
        self._known_first: dict[tuple[int, int], _OfChunk] = {}
        self._known_later: dict[tuple[int, int], _OfChunk] = {}

    def of_clip(self, chunks: int) -> float:
        """Time of one rank for a clip of `chunks`."""
        return self._first[-1] + (chunks - 1) * self._later[-1]

    def before(self, cut: int) -> float:
        """Time of the ops before `cut` for a later chunk."""
        return self._later[cut]

    def departures(self, runs: Iterable[tuple[int, int]], arrivals: Sequence[float] | None = None) -> list[float]:
        """When each portion leaves a stage that runs the ops `runs` on the chunks.

        They come at `arrivals` (None: all are there).
        """
        # A search calls this very often, so it makes few calls itself.
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
        """For a chunk: time of the early ops and number of their portions; the same of the late ops."""
        start, stop = run
        sums, program = self._first if first else self._later, self.program
        early = max(start, min(stop, program.portions_from))
        given, left = (program.portions_at(cut, first=first) for cut in run)
        found = (sums[early] - sums[start]) / given, given, (sums[stop] - sums[early]) / left, left // given
        (self._known_first if first else self._known_later)[run] = found
        return found
