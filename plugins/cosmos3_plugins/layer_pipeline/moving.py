"""Cuts of a line that move from chunk to chunk.

Whole ops do not divide evenly: a cut that lies now before and now after an op makes its neighbours equally busy.
And where every chunk is cut alike, late ranks wait for the first chunks and early ranks have nothing to do during
the last: a cut that begins some ops early lets the rank after it begin early, and one that ends late lets the rank
before it do some of the rest. Every rank that runs an op now and then holds its weights.

A cut moves back over any number of ops, but not behind where the one before it was, and what those keep from one
chunk for the next is sent along with it. It moves on over one such op at a time: the rank before it has then seen
that op's input, and kept what it needs.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from cosmos3_pipeline.vae.line_times import ChunkCosts, LineTimes
from cosmos3_pipeline.vae.ops import SpatialUp
from cosmos3_pipeline.vae.program import Program
from cosmos3_plugins.layer_pipeline.balance import CHUNKS, Run, best_runs, speed_up

# By how many places cuts may begin early and end late.
_RAMPS = ((0, 0), (1, 1), (2, 1), (3, 2), (4, 3), (4, 4))
# By which part of itself a clip has to end sooner for each part of the weights that is held twice, and at least.
_FOR_WEIGHTS = 0.1
_FOR_MOVING = 0.003
# In so many parts of the way from one place to the next the mean of a cut is chosen; by how many it is varied.
_PARTS = 8
_SOONER = 1e-4  # what a variation has to gain
_STEPS = (-8, -4, -2, -1, 1, 2, 4, 8)


@cache
def moving_runs(program: Program, ranks: int, costs: ChunkCosts, chunks: int) -> tuple[Run, ...]:
    """`ranks` runs, the cuts between which move such that a clip of `chunks` ends early.

    The ops of each, whose weights it holds, do not depend on `chunks`. `best_runs` where moving is not worth it.
    """
    standard = _standard(program, ranks, costs)
    if standard is None:
        return best_runs(program, ranks, costs)
    line = _Line(LineTimes(program, costs), chunks, standard.ramp, standard.bounds)
    found = line.improved(standard.parts)
    # Should the ramp not fit a short clip within these bounds, its cuts are those of the middle of a long one.
    cuts = found.cuts if found else [[path[CHUNKS // 2]] * chunks for path in standard.cuts]
    edges = [[0] * chunks, *cuts, [len(program)] * chunks]
    return tuple(
        Run(ops, tuple(zip(starts, stops, strict=True)))
        for ops, (starts, stops) in zip(standard.ops(program), pairwise(edges), strict=True)
    )


@dataclass(frozen=True)
class _Found:
    """Paths of the cuts of a line, op by chunk, around so many `parts` of places.

    leaving: when portions pass each cut. end: when the clip ends.
    """

    parts: tuple[int, ...]
    cuts: tuple[tuple[int, ...], ...]
    leaving: tuple[list[float], ...]
    end: float


@dataclass(frozen=True)
class _Standard:
    """How cuts move in a clip of `CHUNKS`: with which ramp, around which parts of places, and where."""

    ramp: tuple[int, int]
    parts: tuple[int, ...]
    cuts: tuple[tuple[int, ...], ...]

    @property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """The first and the last op before which each cut lies."""
        return tuple((min(path), max(path)) for path in self.cuts)

    def ops(self, program: Program) -> list[tuple[int, int]]:
        """The ops of which each rank runs some on each chunk, and the others on other chunks."""
        firsts, lasts = zip(*self.bounds, strict=True)
        return list(zip((0, *firsts), (*lasts, len(program)), strict=True))


@cache
def _standard(program: Program, ranks: int, costs: ChunkCosts) -> _Standard | None:
    """None where moving cuts are not worth it."""
    if ranks == 1:
        return None
    whole = best_runs(program, ranks, costs)
    times = LineTimes(program, costs)
    best, least = None, (1 - _FOR_MOVING) / speed_up(program, costs, whole, CHUNKS)
    for ramp in _RAMPS:
        line = _Line(times, CHUNKS, ramp)
        found = line.improved(line.even(ranks)) or line.improved(line.near([run.ops[1] for run in whole[:-1]]))
        if found is None:
            continue
        standard = _Standard(ramp, found.parts, found.cuts)
        twice = sum(program.weight_elements(*ops) for ops in standard.ops(program)) / program.weight_elements() - 1
        needed = found.end / times.of_clip(CHUNKS) * (1 + _FOR_WEIGHTS * twice)
        if needed < least:
            best, least = standard, needed
    return best


def _places(program: Program) -> list[int]:
    """The ops before which a cut may lie, in order. No two of those that keep frames are between two of them."""
    ups = [isinstance(op, SpatialUp) for op in program.ops]
    return [n for n in range(1, len(program)) if program.ops[n].cached_frames or ups[n] or ups[n - 1]]


class _Line:
    """Paths of cuts along the places of a program, for a clip of `chunks`.

    Cuts begin and end with the `ramp`. Each stays between the ops `bounds[which]`, if given.
    """

    def __init__(
        self,
        times: LineTimes,
        chunks: int,
        ramp: tuple[int, int],
        bounds: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self._times = times
        self._program = times.program
        self._chunks = chunks
        self._early, self._late = ramp
        self._places = _places(self._program)
        self._stretches = self._found_stretches()
        self._rest = [times.after(cut, chunks) for cut in range(len(self._program) + 1)]
        self._start, self._stop = (0,) * chunks, (len(self._program),) * chunks
        self._paths: dict[tuple[int, tuple[int, int]], tuple[int, ...]] = {}
        index = {op: place for place, op in enumerate(self._places)}
        self._bounds = [(index[first], index[last]) for first, last in bounds] if bounds else None

    def even(self, ranks: int) -> tuple[int, ...]:
        """Parts of places at which every rank has as much to do with a later chunk."""
        before = [self._times.before(place) for place in self._places]
        parts = []
        for rank in range(1, ranks):
            wanted = self._times.before(len(self._program)) * rank / ranks
            place = max(0, min(len(before) - 2, bisect_right(before, wanted) - 1))
            on = (wanted - before[place]) / (before[place + 1] - before[place])
            parts.append(round(_PARTS * (place + max(0.0, min(1.0, on)))))
        return tuple(parts)

    def near(self, cuts: Sequence[int]) -> tuple[int, ...]:
        """Parts of the places that are nearest to the ops `cuts`."""
        return tuple(
            _PARTS * min(range(len(self._places)), key=lambda place: abs(self._places[place] - cut))
            for cut in cuts
        )

    def improved(self, parts: tuple[int, ...]) -> _Found | None:
        """Cuts around `parts` or where a clip ends sooner; None if some would leave a rank nothing to do."""
        best, ended = self._found(parts), math.inf
        # One cut after the other is varied, alone and with all after it, until nothing is gained.
        while best and best.end < ended:
            ended = best.end
            for which in range(len(parts)):
                for stop in sorted({which + 1, len(parts)}):
                    for step in _STEPS:
                        varied = [part + step * (which <= i < stop) for i, part in enumerate(best.parts)]
                        best = self._found(tuple(varied), best) or best
        return best

    def _found(self, parts: tuple[int, ...], near: _Found | None = None) -> _Found | None:
        """The cuts around `parts`; None if some rank would have nothing to do, or has not what another needs.

        What they have in common with those that are `near` is taken from there; None too unless they end sooner.
        """
        limit = near.end * (1 - _SOONER) if near else math.inf
        cuts: list[tuple[int, ...]] = []
        leaving: list[list[float]] = []
        for which, part in enumerate(parts):
            if near and near.parts[: which + 1] == parts[: which + 1]:
                cuts.append(near.cuts[which])
                leaving.append(near.leaving[which])
                continue
            path = self._path(which, part)
            before = cuts[-1] if cuts else self._start
            if path is None or any(map(operator.ge, before, path)) or any(map(operator.gt, before, path[1:])):
                return None
            leaving.append(
                self._times.departures(zip(before, path, strict=True), leaving[-1] if leaving else None)
            )
            cuts.append(path)
            if leaving[-1][-1] + self._rest[path[-1]] >= limit:
                return None
        last = self._times.departures(zip(cuts[-1], self._stop, strict=True), leaving[-1])
        return _Found(parts, tuple(cuts), tuple(leaving), last[-1]) if last[-1] < limit else None

    def _path(self, which: int, part: int) -> tuple[int, ...] | None:
        """The ops before which cut `which` lies, chunk by chunk, whose mean is around `part` parts of a place."""
        place, on = divmod(part, _PARTS)
        if not 0 <= place < len(self._places):
            return None
        bounds = self._bounds[which] if self._bounds else self._stretches[place]
        if (part, bounds) not in self._paths:
            path: list[int] = []
            for chunk in range(self._chunks):
                ramp = max(0, chunk - (self._chunks - 1 - self._late)) - max(0, self._early - chunk)
                wanted = place + (chunk + 1) * on // _PARTS - chunk * on // _PARTS + ramp
                path.append(max(bounds[0], min(bounds[1], wanted, self._furthest(path))))
            self._paths[part, bounds] = tuple(self._places[at] for at in path)
        return self._paths[part, bounds]

    def _furthest(self, path: Sequence[int]) -> int:
        """How far a cut may lie on the next chunk after it has been at the places `path`."""
        if not path:
            return len(self._places)
        # The rank before it has to have seen all that the op there keeps.
        seen = path[-max(1, self._program.chunks_kept(self._places[path[-1]])) :]
        return path[-1] + (min(seen) == path[-1])

    def _found_stretches(self) -> list[tuple[int, int]]:
        """For each place, the first and the last to which a cut may move from there."""
        found: list[tuple[int, int]] = []
        while len(found) < len(self._places):
            first = last = len(found)
            while last + 1 < len(self._places) and all(
                map(self._program.can_change_ranks, range(self._places[last], self._places[last + 1]))
            ):
                last += 1
            found += [(first, last)] * (last + 1 - first)
        return found
