"""What the ops of a program cost beside each other, without a weight read: in FLOPs, for the ranks of a line.

Fitted to what ops took on one core of an EPYC 9004, in float32, at decoder widths from 16 to 256 with 8 to 1080
latent pixels (22 shapes): the share of a later chunk before a cut in the middle is within 1.2 percentage points of
that, 1.6 in one shape, and what the first chunk takes of a later one, 0.17 to 0.22, within 0.02.
"""

from __future__ import annotations

import math
from functools import cache

from cosmos3_pipeline.vae.footprint import makes_frame_pairs
from cosmos3_pipeline.vae.line_times import ChunkCosts
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


@cache
def op_costs(
    program: Program, flops_per_element: float, pixels: int = LARGE_PIXELS, element_bytes: int = 4
) -> ChunkCosts:
    """Cost of each op on chunks of `pixels` latent pixels, in FLOPs.

    Touching an element of an activation counts `flops_per_element`. In float32, of 4 `element_bytes`, the
    convolutions are those of a CPU, which makes two frames at a time.
    """
    latent = chunks_of(pixels, element_bytes)

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


def chunks_of(pixels: int, element_bytes: int = 4) -> LatentShape:
    """A clip of a first chunk and a later one, of `pixels` latent pixels."""
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
