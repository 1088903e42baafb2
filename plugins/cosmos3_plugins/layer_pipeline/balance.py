"""Cutting a program into runs, the ranks of a line, such that the line ends as early as possible."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Protocol

from cosmos3_pipeline.vae.program import Program
from cosmos3_pipeline.vae.strategy import Turns, ops_on
from cosmos3_plugins.layer_pipeline.costs import LARGE_PIXELS, ChunkCosts, chunks_of, op_costs

# Chunks of the clip that a line is divided for: 125 frames of video. The same for all clips, which share weights.
_CHUNKS = 32
# How far beyond the earliest end a division may go if it then sends less.
_SLACK = 1.002
# Of how many chunks each neighbour runs some of an op that they run in turn, and how much sooner the line has to
# end with such ops, the weights of which both ranks hold.
_OF_CHUNKS = 8
_WORTH_TURNS = 1.005


class Stage(Protocol):
    """A rank of a line, as `Run` and `RankShare` are."""

    @property
    def ops(self) -> tuple[int, int]: ...
    @property
    def turns(self) -> tuple[Turns, ...]: ...


@dataclass(frozen=True)
class Run:
    """The ops [start, stop) of a rank, which may run the first and the last in turn with its neighbours."""

    ops: tuple[int, int]
    turns: tuple[Turns, ...] = ()


@cache
def best_runs(
    program: Program,
    ranks: int,
    flops_per_element: float,
    pixels: int = LARGE_PIXELS,
    element_bytes: int = 4,
    *,
    takes_turns: bool = False,
) -> tuple[Run, ...]:
    """`ranks` runs that cover the program in order, with which a clip of `_CHUNKS` ends earliest. `ranks` <= ops.

    Among divisions that are hardly later, the one whose cuts are crossed by the least data. If it `takes_turns`,
    neighbours may run the op between them in turn, where that is worth it.
    """
    costs = op_costs(program, flops_per_element, pixels, element_bytes)
    ends = _Ends(program, costs)
    latent = chunks_of(pixels, element_bytes)
    crossing = [
        sum(spec.elements(latent, first=False) for spec in program.carried(cut)) for cut in range(len(program))
    ]
    between_ops = cache(ends)
    cuts = _least_crossing(between_ops, crossing, ranks, _SLACK * _earliest(between_ops, len(program), ranks))
    whole = tuple(Run(ops) for ops in pairwise(cuts))
    if not takes_turns:
        return whole
    in_turn = _in_turn(program, _even_cuts(ends, ranks))
    gain = speed_up(program, costs, in_turn, _CHUNKS) / speed_up(program, costs, whole, _CHUNKS) if in_turn else 0
    return in_turn if gain >= _WORTH_TURNS else whole


def speed_up(program: Program, costs: ChunkCosts, stages: Iterable[Stage], chunks: int) -> float:
    """How many times as fast as one rank a line of `stages` is at best, whose messages take no time."""
    arrivals: list[float] | None = None  # of the portions, at the stage that is looked at
    for stage in sorted(stages, key=lambda stage: stage.ops):
        arrivals = _departures(program, costs, stage, chunks, arrivals)
    assert arrivals is not None, "a line has a stage"
    return costs.of_clip(chunks) / arrivals[-1]


def _departures(
    program: Program, costs: ChunkCosts, stage: Stage, chunks: int, arrivals: Sequence[float] | None
) -> list[float]:
    """When each portion leaves a stage, to which they come at `arrivals` (None: all are there)."""
    coming = iter(arrivals or ())
    now, leaving = 0.0, []
    for chunk in range(chunks):
        first = chunk == 0
        cost = costs.first if first else costs.later
        start, stop = ops_on(chunk, stage.ops, stage.turns)
        early = max(start, min(stop, program.portions_from))
        given = program.portions_at(start, first=first)
        left = program.portions_at(stop, first=first)
        for _ in range(given):
            now = max(now, next(coming, 0.0)) + sum(cost[start:early]) / given
            for _ in range(left // given):
                now += sum(cost[early:stop]) / left
                leaving.append(now)
    return leaving


class _Ends:
    """When a line of `_CHUNKS` chunks ends whose rank with a run is the one that the others wait for.

    That one begins when what it needs has passed the ops before its run. When it has ended, one portion has yet to
    pass those after it. A cut may fall within an op, of which each rank then has a part.
    """

    def __init__(self, program: Program, costs: ChunkCosts) -> None:
        portion = [cost / program.portions_at(i + 1, first=False) for i, cost in enumerate(costs.later)]
        self.ops = len(program)
        self._first, self._later, self._portion = (
            [0.0, *accumulate(part)] for part in (costs.first, costs.later, portion)
        )

    def __call__(self, start: float, stop: float) -> float:
        first = [_at(self._first, cut) for cut in (start, stop)]
        later = [_at(self._later, cut) for cut in (start, stop)]
        portion = [_at(self._portion, cut) for cut in (start, stop)]
        # While the rank works on its first chunk, which is small, the next one's first portion is on its way.
        beginning = first[0] + max(first[1] - first[0], portion[0])
        return beginning + (_CHUNKS - 1) * (later[1] - later[0]) + self._portion[-1] - portion[1]

    def furthest(self, start: float, limit: float) -> float:
        """The last cut at which a run from `start` on may end, for the line to end by `limit`; `start` if none."""
        if self(start, self.ops) <= limit:
            return self.ops
        cut = bisect_right(range(self.ops + 1), limit, lo=math.ceil(start), key=lambda stop: self(start, stop)) - 1
        low = max(start, cut)
        from_low, to_next = limit - self(start, low), self(start, cut + 1) - self(start, low)
        return max(start, low + (cut + 1 - low) * from_low / to_next)


def _at(sums: Sequence[float], cut: float) -> float:
    """The sum of what comes before `cut`, which may fall between two of the numbers."""
    below = int(cut)
    return sums[below] + ((cut - below) * (sums[below + 1] - sums[below]) if cut > below else 0.0)


def _even_cuts(ends: _Ends, ranks: int) -> list[float]:
    """The cuts of a line of `ranks`, within ops too, with which it ends earliest."""
    low, high = 0.0, ends(0, ends.ops)
    cuts = [0.0] * (ranks - 1)
    while high - low > 1e-6 * high:
        limit = (low + high) / 2
        found = [0.0]
        for _ in range(ranks):
            found.append(ends.furthest(found[-1], limit))
        if found[-1] >= ends.ops:
            high, cuts = limit, found[1:-1]
        else:
            low = limit
    return cuts


def _in_turn(program: Program, cuts: Iterable[float]) -> tuple[Run, ...]:
    """Runs with such cuts, those within ops by turns. Empty where a rank would have no op for itself."""
    turns: list[Turns] = []
    edges = [(0, 0)]  # of the ops that each rank has for itself
    for cut in cuts:
        op, before = divmod(round(cut * _OF_CHUNKS), _OF_CHUNKS)
        if before and program.can_take_turns(op):
            turns.append(Turns(op, before, _OF_CHUNKS))
            edges.append((op, op + 1))
        else:
            op = round(cut)
            edges.append((op, op))
    edges.append((len(program), len(program)))
    if any(start >= stop for (_, start), (stop, _) in pairwise(edges)):
        return ()
    runs = [(start, stop) for (start, _), (_, stop) in pairwise(edges)]
    return tuple(Run(run, tuple(one for one in turns if run[0] <= one.op < run[1])) for run in runs)


def _earliest(ends: Callable[[int, int], float], ops: int, ranks: int) -> float:
    """The earliest end of a line of `ranks`."""
    best = [0.0] + [math.inf] * ops
    for _ in range(ranks):
        best = [math.inf] + [
            min(max(best[cut], ends(cut, stop)) for cut in range(stop)) for stop in range(1, ops + 1)
        ]
    return best[ops]


def _least_crossing(
    ends: Callable[[int, int], float], crossing: Sequence[int], ranks: int, limit: float
) -> list[int]:
    """The cuts (first 0, last the end) of `ranks` runs that end by `limit`, over which the least data passes."""
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, (0,))] + [(math.inf, ())] * len(crossing)
    for _ in range(ranks):
        following: list[tuple[float, tuple[int, ...]]] = [(math.inf, ())]
        for stop in range(1, len(crossing) + 1):
            sent, cuts = min(
                (
                    (best[cut][0] + (crossing[cut] if cut else 0), best[cut][1])
                    for cut in range(stop)
                    if best[cut][1] and ends(cut, stop) <= limit
                ),
                default=(math.inf, ()),
            )
            following.append((sent, (*cuts, stop)) if cuts else (math.inf, ()))
        best = following
    return list(best[len(crossing)][1])
