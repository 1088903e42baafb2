"""Cutting a program into contiguous runs, the ranks of a line, such that the line ends as early as possible."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate, pairwise

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
# chunk does anew, and partly while it computes: of both an op takes the root of the sum of squares. Fitted: the
# share of the ops before a cut in the middle is then within 0.8% of what they took on one core, at decoder widths
# from 16 to 256 with 8 to 780 pixels; within 1.4% at 160 with 20. Weights of an op up to so many stay in a cache.
_FLOPS_PER_WEIGHT = 105
_CACHED_WEIGHTS = 1 << 20
# Output channels of one vector of a convolution kernel, and what a product costs with one or two vectors, which do
# not reach the full rate, and where the last is not full. From oneDNN with AVX-512 in a decode: 240 GFLOP/s at 48
# channels and more, 228 at 32, 190 at 40, 153 at 24, 148 at 12; at 16, alone, 205.
_CHANNEL_BLOCK = 16
_FEW_BLOCKS = {1: 1.15, 2: 1.05}
_PART_OF_A_BLOCK = 1.07
# How often an op goes through its input and output; a convolution does so once. Interleaving what was computed and
# averaging are ways through memory of their own; a norm's passes but the first and the last find it in a cache.
_PASSES = {NormSilu: 2.5, SpatialUp: 4.0, TimeUp: 3.0, AverageDown: 3.0}
# Where a convolution makes two frames at a time: the part of its products that is left, how many weights there are
# for one, and its ways through input and output, most of them for sums and differences of frames.
_PAIR_PRODUCTS, _PAIR_WEIGHTS, _PAIR_PASSES = 2 / 3, 4 / 3, 2.5
# Chunks of the clip that a line is divided for: 125 frames of video. The same for all clips, which share weights.
_CHUNKS = 32
# How far beyond the least cost of the costliest run a division may go if it then sends less.
_SLACK = 1.002


@cache
def op_costs(
    program: Program, flops_per_element: float, pixels: int = LARGE_PIXELS, element_bytes: int = 4
) -> tuple[float, ...]:
    """Cost of each op on a later chunk of `pixels` latent pixels, in FLOPs.

    Touching an element of an activation counts `flops_per_element`. In float32, of 4 `element_bytes`, the
    convolutions are those of a CPU, which makes two frames at a time.
    """
    latent = _of(pixels, element_bytes)
    costs = []
    for number, op in enumerate(program.ops):
        portions = program.portions_at(number + 1, first=False)
        products, weights, passes = 1.0, 1.0, _PASSES.get(type(op), 1.0)
        if isinstance(op, Conv) and _makes_pairs(op, latent, portions):
            products, weights, passes = _PAIR_PRODUCTS, _PAIR_WEIGHTS, _PAIR_PASSES
        computing = products * op.flops(latent, first=False) * _filled(op.target.channels)
        reading = weights * _weights_read(op) * _FLOPS_PER_WEIGHT * portions
        costs.append(math.hypot(computing, reading) + flops_per_element * _elements_touched(op, latent, passes))
    return tuple(costs)


def _of(pixels: int, element_bytes: int) -> LatentShape:
    return LatentShape(batch=1, frames=2, rows=1, cols=pixels, element_bytes=element_bytes)


def _makes_pairs(op: Conv, latent: LatentShape, portions: int) -> bool:
    _, frames, rows, cols, channels = op.target.shape(latent, first=False)
    pairs = makes_frame_pairs(op.source.channels, channels, op.kernel, frames // portions, rows * cols)
    return latent.element_bytes == 4 and pairs


def _filled(channels: int) -> float:
    """What `channels` outputs cost a convolution kernel by what they need: it computes them in whole blocks."""
    blocks = math.ceil(channels / _CHANNEL_BLOCK)
    part = _PART_OF_A_BLOCK if channels % _CHANNEL_BLOCK else 1.0
    return _FEW_BLOCKS.get(blocks, 1.0) * part * blocks * _CHANNEL_BLOCK / channels


def _weights_read(op: Op) -> int:
    return max(0, op.weight_elements - _CACHED_WEIGHTS)


def _elements_touched(op: Op, latent: LatentShape, passes: float) -> float:
    if isinstance(op, ShortcutBegin) and not op.weights:
        return 0  # keeps its input as it is
    elements = op.source.elements(latent, first=False) + op.target.elements(latent, first=False)
    added = op.duplicates if isinstance(op, SpatialUp) else None
    return passes * elements + (added.kept.elements(latent, first=False) if added else 0)


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
    chunk = op_costs(program, flops_per_element, pixels, element_bytes)
    # A rank begins when a portion has passed the ops before its own, and when it has ended, one has yet to pass
    # those after them. So the line ends by the rank that computes longest, if what one portion takes is left out.
    costs = [_CHUNKS * cost - alone for cost, alone in zip(chunk, _portion_costs(program, chunk), strict=True)]
    latent = _of(pixels, element_bytes)
    crossing = [
        sum(spec.elements(latent, first=False) for spec in program.carried(cut)) for cut in range(len(program))
    ]
    limit = _SLACK * _cheapest_maximum(costs, ranks)
    cuts = _least_crossing(costs, crossing, ranks, limit)
    return tuple(pairwise(cuts))


def speed_up(program: Program, costs: Sequence[float], runs: Iterable[tuple[int, int]], chunks: int) -> float:
    """How many times as fast as one rank a line of `runs` is at best, whose messages take no time.

    `costs` are those of `op_costs`; all chunks count as later ones.
    """
    portion = _portion_costs(program, costs) if chunks > 1 else costs
    longest = max(sum(chunks * costs[op] - portion[op] for op in range(*run)) for run in runs)
    return chunks * sum(costs) / (sum(portion) + longest)


def _portion_costs(program: Program, costs: Sequence[float]) -> list[float]:
    """Of each op for one of the portions in which it sees a chunk."""
    return [cost / program.portions_at(number + 1, first=False) for number, cost in enumerate(costs)]


def _cheapest_maximum(costs: Sequence[float], ranks: int) -> float:
    """The smallest possible cost of the costliest of `ranks` runs."""
    ends = [0.0, *accumulate(costs)]
    count = len(costs)
    best = [0.0] + [math.inf] * count
    for _ in range(ranks):
        best = [math.inf] + [
            min(max(best[cut], ends[stop] - ends[cut]) for cut in range(stop)) for stop in range(1, count + 1)
        ]
    return best[count]


def _least_crossing(costs: Sequence[float], crossing: Sequence[int], ranks: int, limit: float) -> list[int]:
    """The cuts (first 0, last the end) of `ranks` runs, none above `limit`, over which the least data passes."""
    ends = [0.0, *accumulate(costs)]
    count = len(costs)
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, (0,))] + [(math.inf, ())] * count
    for _ in range(ranks):
        following: list[tuple[float, tuple[int, ...]]] = [(math.inf, ())]
        for stop in range(1, count + 1):
            sent, cuts = min(
                (
                    (best[cut][0] + (crossing[cut] if cut else 0), best[cut][1])
                    for cut in range(stop)
                    if best[cut][1] and ends[stop] - ends[cut] <= limit
                ),
                default=(math.inf, ()),
            )
            following.append((sent, (*cuts, stop)) if cuts else (math.inf, ()))
        best = following
    return list(best[count][1])
