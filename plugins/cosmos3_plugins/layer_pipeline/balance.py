"""Cutting a program into runs, the ranks of a line, such that the line ends as early as possible."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

from cosmos3_pipeline.vae.line_times import ChunkCosts, LineTimes, Stage, line_end
from cosmos3_pipeline.vae.program import Program
from cosmos3_plugins.layer_pipeline.costs import chunks_of

# Chunks of the clip that a line is divided for: 125 frames of video. The same for all clips, which share weights.
CHUNKS = 32
# How far beyond the earliest end a division may go if it then sends less.
_SLACK = 1.002


@dataclass(frozen=True)
class Run:
    """The ops [start, stop) of a rank; `runs`: those that it runs on each chunk of a clip, if not always all."""

    ops: tuple[int, int]
    runs: tuple[tuple[int, int], ...] = ()

    def on(self, chunk: int) -> tuple[int, int]:
        """The ops that it runs on a chunk."""
        return self.runs[chunk] if self.runs else self.ops


@cache
def best_runs(program: Program, ranks: int, costs: ChunkCosts) -> tuple[Run, ...]:
    """`ranks` runs that cover the program in order, with which a clip of `CHUNKS` ends earliest. `ranks` <= ops.

    Among divisions that are hardly later, the one whose cuts are crossed by the least data.
    """
    ends = cache(_Ends(program, costs))
    latent = chunks_of(1)
    crossing = [
        sum(spec.elements(latent, first=False) for spec in program.carried(cut)) for cut in range(len(program))
    ]
    cuts = _least_crossing(ends, crossing, ranks, _SLACK * _earliest(ends, len(program), ranks))
    return tuple(Run(ops) for ops in pairwise(cuts))


def speed_up(program: Program, costs: ChunkCosts, stages: Iterable[Stage], chunks: int) -> float:
    """How many times as fast as one rank a line of `stages` is at best, whose messages take no time."""
    times = LineTimes(program, costs)
    return times.of_clip(chunks) / line_end(((times, stage) for stage in stages), chunks)


class _Ends:
    """When a line of `CHUNKS` chunks ends whose rank with a run is the one that the others wait for.

    That one begins when what it needs has passed the ops before its run. When it has ended, one portion has yet to
    pass those after it.
    """

    def __init__(self, program: Program, costs: ChunkCosts) -> None:
        portion = [cost / program.portions_at(i + 1, first=False) for i, cost in enumerate(costs.later)]
        self._first, self._later, self._portion = (
            [0.0, *accumulate(part)] for part in (costs.first, costs.later, portion)
        )

    def __call__(self, start: int, stop: int) -> float:
        first, later, portion = self._first, self._later, self._portion
        # While the rank works on its first chunk, which is small, the next one's first portion is on its way.
        beginning = first[start] + max(first[stop] - first[start], portion[start])
        return beginning + (CHUNKS - 1) * (later[stop] - later[start]) + portion[-1] - portion[stop]


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
