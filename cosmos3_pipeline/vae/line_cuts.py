"""Chooses the cuts between the stages of a pipeline, so that a clip ends early. Imports no torch.

Whole ops do not divide evenly between two ranks. If a cut lies before an op on some chunks and behind it on other
chunks, both ranks are equally busy. There is a second gain. If every chunk is cut alike, late ranks wait for the
first chunk, and early ranks are idle during the last chunk. A cut that starts early lets the later rank begin
sooner, and a cut that ends late lets the earlier rank help at the end. The cost is memory: a rank holds the
weights of every op that it runs on any chunk.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from cosmos3_pipeline.vae.costs import ChunkCosts
from cosmos3_pipeline.vae.line_times import LineTimes
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.program import Program

# Places are the positions of useful cuts (`Program.may_be_cut`), counted from 0.
Cuts = tuple[int, ...]  # the ops before which the program is cut, first to last
Path = tuple[int, ...]  # for one cut, the op before which it lies on each chunk
Ramp = tuple[int, int]  # by how many places a cut starts early and ends late
_Cut = tuple[int, Ramp]  # a cut's mean position in 1/_PARTS of a place, and its ramp

_NONE: tuple[float, Cuts] = (math.inf, ())
# Fixed cuts are chosen for a clip of this many chunks: 125 frames of video.
_CHUNKS = 32
# Fixed cuts may end a clip this much later than the earliest end, if they send fewer bytes.
_SLACK = 1.002
# Ramps to try: by how many places cuts start early and end late.
_RAMPS = ((0, 0), (1, 1), (2, 1), (3, 2), (4, 3), (4, 4))
# Cuts move only if this shortens the clip by 1% per 10% of the weights that are held twice, and by 0.3% at least.
_MIN_SPEEDUP_PER_EXTRA_WEIGHT, _MIN_SPEEDUP = 0.1, 0.003
# On accelerators extra weights matter less, because the VAE's weights are only a twentieth of the transformer's,
# which the device must hold before.
_MIN_SPEEDUP_PER_EXTRA_WEIGHT_ON_ACCELERATORS = 0.01
# Steps, in places, by which the search varies the start and the end of one cut.
_RAMP_STEPS = ((1, 0), (-1, 0), (0, 1), (0, -1))
# Resolution of the search for a cut's mean position, in steps per place, and the steps by which it is varied.
_PARTS = 8
_STEPS = (-8, -4, -2, -1, 1, 2, 4, 8)
_SOONER = 1e-4  # the search takes a variation only with at least this relative gain
# Cuts do not move with more than this many ranks, because a stage then has too few ops to move over.
_MOST_RANKS = 8


class LineCuts(NamedTuple):
    """Where a program is divided among the stages of a pipeline.

    paths: for each cut, first to last, the op before which it lies on each chunk.
    speed_up: the pipeline's speed as a multiple of one rank's, if messages take no time.
    """

    paths: tuple[Path, ...]
    speed_up: float

    @property
    def move(self) -> bool:
        """Whether a cut lies before different ops on different chunks."""
        return any(len(set(path)) > 1 for path in self.paths)


def line_cuts(
    program: Program, costs: ChunkCosts, ranks: int, chunks: int, *, moving: bool = True, on_host: bool = True
) -> LineCuts:
    """The cuts with which `ranks` stages, one op at least in each, end a clip of `chunks` early.

    moving: whether cuts may move from chunk to chunk. They do if the clip then ends so much earlier that it is
    worth the weights that are held twice (`_MIN_SPEEDUP_PER_EXTRA_WEIGHT`).
    on_host: whether CPUs compute. The costs of accelerators are less even, so the search tries more there.
    """
    fixed = _fixed_cuts(program, costs, ranks)
    paths = [(cut,) * chunks for cut in fixed]
    if moving and ranks > 1:
        paths = _moving_cuts(program, costs, fixed, chunks, on_host=on_host) or paths
    return LineCuts(tuple(paths), _speed_up(program, costs, paths, chunks))


@cache
def _fixed_cuts(program: Program, costs: ChunkCosts, ranks: int) -> Cuts:
    """Cuts with which a clip of `_CHUNKS` ends earliest; if nearly equal, those that send the fewest bytes."""
    latent = LatentShape(1, 2, 1, 1)
    sent = [
        sum(spec.elements(latent, first=False) for spec in program.carried(cut)) for cut in range(len(program))
    ]
    ends = _ends(program, costs)
    stops = range(1, len(program) + 1)
    best: list[float] = [0.0] + [math.inf] * len(program)
    for _ in range(ranks):
        best = [
            math.inf,
            *(min(max(best[cut], ends[cut][stop]) for cut in range(stop)) for stop in stops),
        ]
    least: list[tuple[float, Cuts]] = [(0.0, ())] + [_NONE] * len(program)
    for _ in range(ranks):
        least = [_NONE] + [
            min(
                (
                    (least[cut][0] + (sent[cut] if cut else 0), (*least[cut][1], stop))
                    for cut in range(stop)
                    if least[cut][0] < math.inf and ends[cut][stop] <= _SLACK * best[-1]
                ),
                default=_NONE,
            )
            for stop in stops
        ]
    return least[-1][1][:-1]


def _ends(program: Program, costs: ChunkCosts) -> list[list[float]]:
    """`[start][stop]`: when a clip ends if its slowest rank runs the ops [start, stop).

    This time is the ops before on the first chunk, the rank's ops on all chunks, and one portion of the ops after.
    """
    first, later = costs
    portions = [of_op / program.portions_at(op + 1, first=False) for op, of_op in enumerate(later)]
    before, before_portion = [0.0, *accumulate(first)], [0.0, *accumulate(portions)]
    after = [sum(portions[stop:]) for stop in range(len(program) + 1)]
    ends = []
    for start in range(len(program)):
        own = zip(accumulate(first[start:]), accumulate(later[start:]), after[start + 1 :], strict=True)
        ends.append(
            [math.inf] * (start + 1)
            + [
                before[start] + max(own_first, before_portion[start]) + (_CHUNKS - 1) * own_later + left
                for own_first, own_later, left in own
            ]
        )
    return ends


@cache
def _moving_cuts(
    program: Program, costs: ChunkCosts, fixed: Cuts, chunks: int, *, on_host: bool = True
) -> list[Path] | None:
    """The path of each cut over a clip of `chunks`; None if moving cuts are not worth it.

    On accelerators the search varies the ramp of each cut separately, and weights held twice count less.
    """
    if len(fixed) >= _MOST_RANKS:
        return None
    line = _Line(program, costs, chunks)
    end, best = line.end([(cut,) * chunks for cut in fixed]) * (1 - _MIN_SPEEDUP), None
    for ramp in _RAMPS:
        starts = (line.even(len(fixed)), line.near(fixed))
        paths = next(filter(None, (line.improved(parts, ramp, apart=not on_host) for parts in starts)), None)
        if paths is None:
            continue
        weight = _MIN_SPEEDUP_PER_EXTRA_WEIGHT if on_host else _MIN_SPEEDUP_PER_EXTRA_WEIGHT_ON_ACCELERATORS
        weighed = line.end(paths) * (1 + weight * line.held_twice(paths))
        if weighed < end:
            end, best = weighed, paths
    return best


def _speed_up(program: Program, costs: ChunkCosts, paths: Sequence[Path], chunks: int) -> float:
    """Speed of a pipeline with cuts on `paths`, as a multiple of one rank, if messages take no time."""
    return LineTimes(program, costs).of_clip(chunks) / _Line(program, costs, chunks).end(paths)


def _moved(cut: _Cut, change: _Cut) -> _Cut:
    (part, (early, late)), (step, (more_early, more_late)) = cut, change
    return part + step, (early + more_early, late + more_late)


def _in_order(before: Path, path: Path) -> bool:
    """Whether two neighbouring cuts are in order.

    The rank between them must have an op on each chunk. On the next chunk the cut `before` must not lie behind the
    place of `path` on this chunk.
    """
    return all(a < b for a, b in zip(before, path, strict=True)) and all(
        a <= b for a, b in zip(before[1:], path, strict=False)
    )


class _Line:
    """Paths of cuts along the places of a program. At most one op between two places keeps frames."""

    def __init__(self, program: Program, costs: ChunkCosts, chunks: int) -> None:
        self._program, self._chunks = program, chunks
        self._times = LineTimes(program, costs)
        self._places = [n for n in range(1, len(program)) if program.may_be_cut(n)]
        self._known: dict[tuple[int, int, int, int], Path] = {}
        # Caches, because the search tries the same cuts again and again. `_not_before`: lower bounds of the clip's
        # end.
        self._in_order: dict[tuple[_Cut | None, _Cut], bool] = {}
        self._not_before: dict[tuple[_Cut, ...], float] = {}

    def end(self, paths: Sequence[Path]) -> float:
        """When a clip ends."""
        return self._leaving(paths, [], math.inf)[-1][-1]

    def _leaving(self, paths: Sequence[Path], known: list[list[float]], limit: float) -> list[list[float]]:
        """When portions leave each stage; the first are `known`. Stops after a stage that ends at `limit`."""
        found = list(known)
        edges = [(0,) * self._chunks, *paths, (len(self._program),) * self._chunks]
        for starts, stops in list(pairwise(edges))[len(known) :]:
            runs = zip(starts, stops, strict=True)
            found.append(self._times.departures(runs, found[-1] if found else None))
            if found[-1][-1] >= limit:
                break
        return found

    def held_twice(self, paths: Sequence[Path]) -> float:
        """The share of the weights over which cuts move, and which two ranks therefore hold."""
        moved = sum(self._program.weight_elements(min(path), max(path)) for path in paths)
        return moved / self._program.weight_elements()

    def even(self, cuts: int) -> list[int]:
        """Mean positions of cuts, in 1/_PARTS of a place, with which ranks take equally long for a later chunk."""
        before = [self._times.before(place) for place in self._places]
        parts = []
        for cut in range(1, cuts + 1):
            wanted = self._times.before(len(self._program)) * cut / (cuts + 1)
            place = max(0, min(len(before) - 2, bisect_right(before, wanted) - 1))
            on = (wanted - before[place]) / (before[place + 1] - before[place])
            parts.append(round(_PARTS * (place + max(0.0, min(1.0, on)))))
        return parts

    def near(self, cuts: Cuts) -> list[int]:
        """The positions (in 1/_PARTS of a place) of the places nearest to `cuts`."""
        return [_PARTS * min(range(len(self._places)), key=lambda p: abs(self._places[p] - cut)) for cut in cuts]

    def improved(self, parts: list[int], ramp: Ramp, *, apart: bool = False) -> list[Path] | None:
        """Search from mean positions `parts` for paths with which a clip ends sooner.

        Returns None if the start leaves a rank without ops. With `apart`, the ramp of each cut is varied too.
        """
        at = [(part, ramp) for part in parts]
        best = self._paths(at)
        if best is None:
            return None
        leaving, before = self._leaving(best, [], math.inf), math.inf
        end = leaving[-1][-1]
        while end < before:  # one cut after the other is varied, alone and with all after it
            before = end
            for which in range(len(parts)):
                for varied in self._variations(which, len(parts), apart=apart):
                    limit = end * (1 - _SOONER)
                    tried = [_moved(cut, change) for cut, change in zip(at, varied, strict=True)]
                    if self._not_before.get(tuple(tried), 0.0) >= limit:
                        continue
                    paths = self._paths(tried)
                    if paths is None:
                        self._not_before[tuple(tried)] = math.inf
                        continue
                    found = self._leaving(paths, leaving[:which], limit)
                    self._not_before[tuple(tried)] = found[-1][-1]
                    if found[-1][-1] < limit:
                        at, best, leaving, end = tried, paths, found, found[-1][-1]
        return best

    @staticmethod
    def _variations(which: int, cuts: int, *, apart: bool) -> Iterator[list[_Cut]]:
        """The changes to try: what is added to each cut. Cut `which` is the first that changes."""
        for stop in sorted({which + 1, cuts}):
            for step in _STEPS:
                yield [(step * (which <= i < stop), (0, 0)) for i in range(cuts)]
        for early, late in _RAMP_STEPS if apart else ():
            yield [(0, (early * (i == which), late * (i == which))) for i in range(cuts)]

    def _paths(self, cuts: Sequence[_Cut]) -> list[Path] | None:
        paths: list[Path] = []
        previous: _Cut | None = None
        for cut in cuts:
            part, ramp = cut
            if not 0 <= part < _PARTS * len(self._places) or min(ramp) < 0:
                return None
            path = self._path(*divmod(part, _PARTS), *ramp)
            if (previous, cut) not in self._in_order:
                before = paths[-1] if paths else (0,) * self._chunks
                self._in_order[previous, cut] = _in_order(before, path)
            if not self._in_order[previous, cut]:
                return None
            paths.append(path)
            previous = cut
        return paths

    def _path(self, place: int, on: int, early: int, late: int) -> Path:
        """The path of a cut whose mean is `on`/_PARTS after `place`, with the ramp (`early`, `late`)."""
        if (known := self._known.get((place, on, early, late))) is not None:
            return known
        path: list[int] = []
        for chunk in range(self._chunks):
            ramp = max(0, chunk - (self._chunks - 1 - late)) - max(0, early - chunk)
            wanted = place + (chunk + 1) * on // _PARTS - chunk * on // _PARTS + ramp
            path.append(max(0, min(len(self._places) - 1, wanted, self._furthest(path))))
        self._known[place, on, early, late] = tuple(self._places[at] for at in path)
        return self._known[place, on, early, late]

    def _furthest(self, path: Sequence[int]) -> int:
        """The furthest place of a cut on the next chunk: at most one op further.

        The earlier rank has then seen the input of this op on past chunks, so that no temporal cache is sent.
        """
        if not path:
            return len(self._places)
        seen = path[-max(1, self._program.chunks_kept(self._places[path[-1]])) :]
        return path[-1] + (min(seen) == path[-1])
