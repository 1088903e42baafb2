"""When chunks pass a line of stages, each with a run of ops, if messages take no time. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.program import Program
from cosmos3_pipeline.vae.strategy import RankShare

_OfChunk = tuple[float, int, float, int]  # see `LineTimes._seconds`


class ChunkCosts(NamedTuple):
    """What each op costs on the first chunk, which has one frame everywhere, and on a later one."""

    first: tuple[float, ...]
    later: tuple[float, ...]


class Stage(Protocol):
    """A rank of a line, or ranks with the same ops."""

    def on(self, chunk: int) -> tuple[int, int]:
        """The ops [start, stop) that it runs on `chunk`."""
        ...


class LineTimes:
    """When the portions of chunks leave the stages of a line, whose messages take no time. In units of `costs`."""

    def __init__(self, program: Program, costs: ChunkCosts) -> None:
        self.program = program
        self._first, self._later = ([0.0, *accumulate(part)] for part in costs)
        self._known_first: dict[tuple[int, int], _OfChunk] = {}
        self._known_later: dict[tuple[int, int], _OfChunk] = {}

    def of_clip(self, chunks: int) -> float:
        """What one rank takes for a clip of `chunks`."""
        return self._first[-1] + (chunks - 1) * self._later[-1]

    def before(self, cut: int) -> float:
        """What the ops before `cut` take for a later chunk."""
        return self._later[cut]

    def after(self, cut: int, chunks: int) -> float:
        """What the ops from `cut` on take for the last portion of a clip of `chunks`."""
        sums, program = self._first if chunks == 1 else self._later, self.program
        early = max(cut, program.portions_from)
        late = (sums[-1] - sums[early]) / program.portions_at(len(program), first=chunks == 1)
        return sums[early] - sums[cut] + late

    def departures(self, runs: Iterable[tuple[int, int]], arrivals: Sequence[float] | None = None) -> list[float]:
        """When each portion leaves a stage that runs the ops `runs` on the chunks.

        They come at `arrivals` (None: all are there).
        """
        # Plans search with it: hence as few calls as can be.
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
        """Of a chunk: time of the early ops for a given portion, how many are given; late ops, made of each."""
        start, stop = run
        sums, program = self._first if first else self._later, self.program
        early = max(start, min(stop, program.portions_from))
        given, left = (program.portions_at(cut, first=first) for cut in run)
        found = (sums[early] - sums[start]) / given, given, (sums[stop] - sums[early]) / left, left // given
        (self._known_first if first else self._known_later)[run] = found
        return found


def line_end(stages: Iterable[tuple[LineTimes, Stage]], chunks: int) -> float:
    """When the last portion of a clip of `chunks` leaves the last stage, each with its own times, in any order."""
    arrivals: list[float] | None = None  # of the portions, at the stage that is looked at
    for times, stage in sorted(stages, key=lambda one: one[1].on(0)):
        arrivals = times.departures(map(stage.on, range(chunks)), arrivals)
    assert arrivals is not None, "a line has a stage"
    return arrivals[-1]


def flops_until_end(program: Program, shape: LatentShape, shares: Iterable[RankShare]) -> float:
    """The FLOPs in whose time ranks with `shares` have done a clip of `shape`: their own, and those they wait for.

    Ranks with the same ops work at the same time, each on its part.
    """
    chunks = program.chunks(shape)
    first, later = (tuple(op.flops(shape, first=first) for op in program.ops) for first in (True, False))
    slowest: dict[tuple[int, int], RankShare] = {}
    for share in shares:
        if share.on(0) not in slowest or share.flops > slowest[share.on(0)].flops:
            slowest[share.on(0)] = share
    stages = []
    for share in slowest.values():
        whole = sum(sum((later if chunk else first)[slice(*share.on(chunk))]) for chunk in range(chunks))
        part = share.flops / whole if whole else 0.0
        costs = ChunkCosts(*(tuple(part * flops for flops in each) for each in (first, later)))
        stages.append((LineTimes(program, costs), share))
    return line_end(stages, chunks)
