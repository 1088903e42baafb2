"""Cutting a program into contiguous runs, the ranks of a line, such that the line ends as early as possible."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from cosmos3_pipeline.vae.footprint import makes_frame_pairs
from cosmos3_pipeline.vae.ops import (
    AverageDown,
    Conv,
    LatentShape,
    NormSilu,
    Op,
    ShortcutBegin,
    SpatialUp,
    TimeUp,
)
from cosmos3_pipeline.vae.program import Program

# From so many latent pixels on (512 x 512 of the video) costs are proportional to the picture's size but for
# attention, a thousandth of them; so one division serves all larger clips, which share one set of weights.
LARGE_PIXELS = 1024
# Multiplications and additions in the time in which one weight is read from memory, which each portion of a
# chunk does anew, and partly while it computes: of both an op takes the root of the sum of squares. Weights of an
# op up to so many stay in a cache.
_FLOPS_PER_WEIGHT = 60
_CACHED_WEIGHTS = 1 << 20
# As many in the time that an op takes beside what it computes: 0.2 ms, for its calls, its code and small weights,
# which the ops before it have driven out of the caches.
_CALL_FLOPS = 20_000_000
# A convolution computes its output channels in blocks of so many; what a product costs where the last is not full.
_CHANNEL_BLOCK = 16
_PART_OF_A_BLOCK = 1.04
# How often an op goes through its input and output; a convolution does so once. Interleaving what was computed and
# averaging are ways through memory of their own; a norm's passes but the first and the last find it in a cache.
_PASSES = {NormSilu: 2.0, SpatialUp: 4.0, TimeUp: 4.0, AverageDown: 3.0}
# Where a convolution makes two frames at a time: the part of its products that is left, how many weights it reads
# for one, its ways through input and output, most of them for sums and differences of frames, and its calls.
_PAIR_PRODUCTS, _PAIR_WEIGHTS, _PAIR_PASSES, _PAIR_CALLS = 2 / 3, 5 / 3, 3.3, 2
# Chunks of the clip that a line is divided for: 125 frames of video. The same for all clips, which share weights.
_CHUNKS = 32
# How far beyond the least cost of the costliest run a division may go if it then sends less.
_SLACK = 1.002


class ChunkCosts(NamedTuple):
    """What each op costs on the first chunk, which has one frame everywhere, and on a later one."""

    first: tuple[float, ...]
    later: tuple[float, ...]

    def of_clip(self, chunks: int) -> float:
        """What one rank takes for a clip of `chunks`."""
        return sum(self.first) + (chunks - 1) * sum(self.later)


@cache
def op_costs(
    program: Program, flops_per_element: float, pixels: int = LARGE_PIXELS, element_bytes: int = 4
) -> ChunkCosts:
    """Cost of each op on chunks of `pixels` latent pixels, in FLOPs.

    Touching an element of an activation counts `flops_per_element`. In float32, of 4 `element_bytes`, the
    convolutions are those of a CPU, which makes two frames at a time.
    """
    latent = _of(pixels, element_bytes)

    def cost(number: int, op: Op, *, first: bool) -> float:
        portions = program.portions_at(number + 1, first=first)
        products, weights, passes, calls = 1.0, 1.0, _PASSES.get(type(op), 1.0), 1
        if isinstance(op, ShortcutBegin) and not op.weights:
            return 0.0  # keeps its input as it is
        if isinstance(op, Conv):
            if first:
                weights = 1 / op.kernel[0]
            elif _makes_pairs(op, latent, portions):
                products, weights, passes, calls = _PAIR_PRODUCTS, _PAIR_WEIGHTS, _PAIR_PASSES, _PAIR_CALLS
        computing = products * op.flops(latent, first=first) * _filled(op.target.channels)
        reading = weights * _weights_read(op) * _FLOPS_PER_WEIGHT * portions
        touching = flops_per_element * _elements_touched(op, latent, passes, first=first)
        return math.hypot(computing, reading) + touching + calls * _CALL_FLOPS * portions

    ops = list(enumerate(program.ops))
    return ChunkCosts(*(tuple(cost(number, op, first=first) for number, op in ops) for first in (True, False)))


def _of(pixels: int, element_bytes: int) -> LatentShape:
    return LatentShape(batch=1, frames=2, rows=1, cols=pixels, element_bytes=element_bytes)


def _makes_pairs(op: Conv, latent: LatentShape, portions: int) -> bool:
    _, frames, rows, cols, channels = op.target.shape(latent, first=False)
    pairs = makes_frame_pairs(op.source.channels, channels, op.kernel, frames // portions, rows * cols)
    return latent.element_bytes == 4 and pairs


def _filled(channels: int) -> float:
    """What `channels` outputs cost a convolution kernel by what they need: it computes them in whole blocks."""
    part = _PART_OF_A_BLOCK if channels % _CHANNEL_BLOCK else 1.0
    return part * math.ceil(channels / _CHANNEL_BLOCK) * _CHANNEL_BLOCK / channels


def _weights_read(op: Op) -> int:
    return max(0, op.weight_elements - _CACHED_WEIGHTS)


def _elements_touched(op: Op, latent: LatentShape, passes: float, *, first: bool) -> float:
    elements = op.source.elements(latent, first=first) + op.target.elements(latent, first=first)
    added = op.duplicates if isinstance(op, SpatialUp) else None
    return passes * elements + (added.kept.elements(latent, first=first) if added else 0)


@cache
def best_runs(
    program: Program,
    ranks: int,
    flops_per_element: float,
    pixels: int = LARGE_PIXELS,
    element_bytes: int = 4,
) -> tuple[tuple[int, int], ...]:
    """`ranks` runs [start, stop) that cover the program in order, with which a clip of `_CHUNKS` ends earliest.

    Among divisions that are hardly later, the one whose cuts are crossed by the least data. `ranks` <= ops.
    """
    ends = _Ends(program, op_costs(program, flops_per_element, pixels, element_bytes))
    latent = _of(pixels, element_bytes)
    crossing = [
        sum(spec.elements(latent, first=False) for spec in program.carried(cut)) for cut in range(len(program))
    ]
    limit = _SLACK * _earliest(ends, ranks)
    cuts = _least_crossing(ends, crossing, ranks, limit)
    return tuple(pairwise(cuts))


def speed_up(program: Program, costs: ChunkCosts, runs: Iterable[tuple[int, int]], chunks: int) -> float:
    """How many times as fast as one rank a line of `runs` is at best, whose messages take no time."""
    arrivals: list[float] | None = None  # of the portions, at the stage that is looked at
    for start, stop in sorted(runs):
        arrivals = _departures(program, costs, (start, stop), chunks, arrivals)
    assert arrivals is not None, "a line has a stage"
    return costs.of_clip(chunks) / arrivals[-1]


def _departures(
    program: Program, costs: ChunkCosts, run: tuple[int, int], chunks: int, arrivals: Sequence[float] | None
) -> list[float]:
    """When each portion leaves a stage, to which they come at `arrivals` (None: all are there)."""
    start, stop = run
    early = max(start, min(stop, program.portions_from))
    coming = iter(arrivals or ())
    now, leaving = 0.0, []
    for chunk in range(chunks):
        first = chunk == 0
        cost = costs.first if first else costs.later
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
    pass those after it.
    """

    def __init__(self, program: Program, costs: ChunkCosts) -> None:
        portion = [cost / program.portions_at(i + 1, first=False) for i, cost in enumerate(costs.later)]
        self.ops = len(program)
        self._first, self._later, self._portion = (
            [0.0, *accumulate(part)] for part in (costs.first, costs.later, portion)
        )

    def __call__(self, start: int, stop: int) -> float:
        # While the rank works on its first chunk, which is small, the next one's first portion is on its way.
        beginning = self._first[start] + max(self._first[stop] - self._first[start], self._portion[start])
        computing = (_CHUNKS - 1) * (self._later[stop] - self._later[start])
        return beginning + computing + self._portion[self.ops] - self._portion[stop]


def _earliest(ends: _Ends, ranks: int) -> float:
    """The earliest end of a line of `ranks`."""
    best = [0.0] + [math.inf] * ends.ops
    for _ in range(ranks):
        best = [math.inf] + [
            min(max(best[cut], ends(cut, stop)) for cut in range(stop)) for stop in range(1, ends.ops + 1)
        ]
    return best[ends.ops]


def _least_crossing(ends: _Ends, crossing: Sequence[int], ranks: int, limit: float) -> list[int]:
    """The cuts (first 0, last the end) of `ranks` runs that end by `limit`, over which the least data passes."""
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, (0,))] + [(math.inf, ())] * ends.ops
    for _ in range(ranks):
        following: list[tuple[float, tuple[int, ...]]] = [(math.inf, ())]
        for stop in range(1, ends.ops + 1):
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
    return list(best[ends.ops][1])
