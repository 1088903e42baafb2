"""Relative costs of the ops of a program, in FLOPs, with which strategies balance ranks. No weight is read.

CPU costs are fitted to measured times of ops on one core of an EPYC 9004, in float32, at decoder widths from 16 to
256 with 8 to 1080 latent pixels (22 shapes). Two checks of the fit: the share of a later chunk's time before a cut
in the middle is within 1.2 percentage points of the measured share (1.6 in one shape). The ratio of the first
chunk to a later chunk (0.17 to 0.22) is within 0.02.

Accelerator costs are a roofline of the kernels' FLOPs and bytes. A norm is one pass over memory there.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from cosmos3_pipeline.vae.ops import WHOLE, LatentShape, Op, Sides, Work
from cosmos3_pipeline.vae.program import Program

# With this many latent pixels (512 x 512 of the video) or more, costs are proportional to the picture's size,
# except for attention, which is a thousandth of the total. One division of the ops therefore serves all larger
# clips.
LARGE_PIXELS = 1024
# FLOPs in the time in which one weight is read from memory. Each portion of a chunk reads the weights again,
# partly while it computes, so an op takes sqrt(computing^2 + reading^2). At most _CACHED_WEIGHTS weights of an op
# stay in a cache.
_FLOPS_PER_WEIGHT = 60
_CACHED_WEIGHTS = 1 << 20
# FLOPs in the time in which one element of an activation is read or written.
_FLOPS_PER_ELEMENT = 50.0
# The fixed time of an op, 0.2 ms, in FLOPs. In this time the op makes its calls, and loads its code and small
# weights, because earlier ops have evicted them from the caches.
_CALL_FLOPS = 20_000_000
# A convolution computes output channels in blocks of `_CHANNEL_BLOCK`. If the last block is not full, its cost is
# multiplied by `_PART_OF_A_BLOCK`.
_CHANNEL_BLOCK = 16
_PART_OF_A_BLOCK = 1.04
# Factors for a convolution that computes two frames at a time: its products, the weights that it reads, its passes
# over input and output (most of them for sums and differences of frames), and its calls.
_PAIR_PRODUCTS, _PAIR_WEIGHTS, _PAIR_PASSES, _PAIR_CALLS = 2 / 3, 5 / 3, 3.3, 2
# FLOPs in the time in which an accelerator reads or writes one byte. For an H200 of `conf/topology`: 346 TFLOP/s
# of convolutions and 4.8 TB/s. With 140 instead, a pipeline of four H200 would end 1.5% later.
_FLOPS_PER_BYTE = 70.0
# How often an accelerator reads or writes a frame that an op keeps: it is read, written to the front of the next
# chunk's buffer, and overwritten by the next kept frame.
RECALLED_PASSES = 3
# FLOPs in the time in which a host launches a kernel: 12 us of an H200's convolutions.
_FLOPS_PER_LAUNCH = 4e9


class ChunkCosts(NamedTuple):
    """The cost of each op on the first chunk, which has one frame everywhere, and on a later chunk."""

    first: tuple[float, ...]
    later: tuple[float, ...]


@cache
def op_costs(
    program: Program, pixels: int = LARGE_PIXELS, element_bytes: int = 4, *, on_host: bool = True
) -> ChunkCosts:
    """Cost of each op on chunks of `pixels` latent pixels, in FLOPs; more than LARGE_PIXELS count as LARGE_PIXELS.

    on_host: whether a CPU computes, which makes two frames at a time in float32 (4 `element_bytes`), or an
    accelerator.
    """
    latent = replace(chunks_of(min(pixels, LARGE_PIXELS), element_bytes), on_host=on_host)
    if not on_host:
        roofline, every = RooflineCosts(program, latent, 1.0, 1 / _FLOPS_PER_BYTE), range(len(program))
        return ChunkCosts(
            *(tuple(roofline.seconds(op, 1, first=first) for op in every) for first in (True, False))
        )

    def cost(number: int, op: Op, *, first: bool) -> float:
        portions = program.portions_at(number + 1, first=first)
        if not op.moves_memory:
            return 0.0
        products, weights, passes, calls = 1.0, op.weights_read(first=first), op.memory_passes, 1
        if op.makes_pairs(Work(latent, latent, first, portions)):
            products, weights, passes, calls = _PAIR_PRODUCTS, _PAIR_WEIGHTS, _PAIR_PASSES, _PAIR_CALLS
        computing = products * op.flops(latent, first=first) * _filled(op.target.channels)
        reading = weights * _weights_read(op) * _FLOPS_PER_WEIGHT * portions
        touching = _FLOPS_PER_ELEMENT * _elements_touched(op, latent, passes, first=first)
        return math.hypot(computing, reading) + touching + calls * _CALL_FLOPS * portions

    ops = list(enumerate(program.ops))
    return ChunkCosts(*(tuple(cost(number, op, first=first) for number, op in ops) for first in (True, False)))


def slab_costs(program: Program, shape: LatentShape, bands: int) -> ChunkCosts:
    """Cost of each op, in FLOPs, on the largest of `bands` bands of rows of a clip of `shape`."""
    scales = [min(op.source.scale, op.target.scale) for op in program.ops]
    rows = [math.ceil(shape.rows * scale / bands) / scale for scale in scales]
    if shape.on_host:
        pixels = math.ceil(shape.batch * shape.cols * shape.rows / bands)
        costs, larger = op_costs(program, pixels, shape.element_bytes), max(1.0, pixels / LARGE_PIXELS)
        uneven = [larger * of_op * bands / shape.rows for of_op in rows]
        return ChunkCosts(*(tuple(c * u for c, u in zip(part, uneven, strict=True)) for part in costs))
    roofline = RooflineCosts(program, shape, 1.0, 1 / _FLOPS_PER_BYTE, launch_s=_FLOPS_PER_LAUNCH)
    sides = Sides(above=bands > 1, below=bands > 2, others=bands - 1)
    return ChunkCosts(
        *(
            tuple(roofline.seconds(op, of_op, sides, first=first) for op, of_op in enumerate(rows))
            for first in (True, False)
        )
    )


def chunks_of(pixels: int, element_bytes: int = 4) -> LatentShape:
    """A clip of one first chunk and one later chunk, of `pixels` latent pixels."""
    return LatentShape(batch=1, frames=2, rows=1, cols=pixels, element_bytes=element_bytes)


def _filled(channels: int) -> float:
    """Computed channels / `channels`: a convolution kernel computes output channels in whole blocks."""
    part = _PART_OF_A_BLOCK if channels % _CHANNEL_BLOCK else 1.0
    return part * math.ceil(channels / _CHANNEL_BLOCK) * _CHANNEL_BLOCK / channels


def _weights_read(op: Op) -> int:
    return max(0, op.weight_elements - _CACHED_WEIGHTS)


def _elements_touched(op: Op, latent: LatentShape, passes: float, *, first: bool) -> float:
    elements = op.source.elements(latent, first=first) + op.target.elements(latent, first=first)
    return passes * elements + op.shortcut_elements(latent, first=first)


class RooflineCosts:
    """Seconds of an op: the longer of its arithmetic and its memory traffic (input and output once).

    On an accelerator, the memory traffic of its other kernels (copies, norms and sums) is added to that. On a
    tile, `fixed_share` of an op's seconds stays as on the whole picture, and the rest shrinks in proportion to the
    rows. An op takes at least `launch_s` per kernel, because the host needs this time to launch a kernel.
    """

    def __init__(
        self,
        program: Program,
        shape: LatentShape,
        flops_per_s: float,
        bytes_per_s: float,
        *,
        fixed_share: float = 0.0,
        launch_s: float = 0.0,
    ) -> None:
        self._rows = shape.rows
        self._fixed_share = fixed_share
        self._program, self._shape, self._launch_s = program, shape, launch_s
        self._launches = dict[tuple[int, float, Sides, bool], float]()  # seconds, by op, rows, sides and first
        self._whole = {}
        for first in (True, False):
            self._whole[first] = [
                self._seconds(program, number, shape, first=first, rates=(flops_per_s, bytes_per_s))
                for number in range(len(program))
            ]

    @staticmethod
    def _seconds(
        program: Program, number: int, shape: LatentShape, *, first: bool, rates: tuple[float, float]
    ) -> float:
        """Seconds of one op on the whole picture; rates: FLOPs and bytes per second."""
        op, elements_per_s = program.ops[number], rates[1] / shape.element_bytes
        computing = op.flops(shape, first=first) / rates[0]
        touched = op.source.elements(shape, first=first) + op.target.elements(shape, first=first)
        if shape.on_host:
            return max(computing, touched / elements_per_s)
        moved = op.moved_elements(shape, first=first)
        if op.keeps(first=first) and not first:
            frame = op.source.elements(shape, first=True)
            moved += RECALLED_PASSES * op.cached_frames * frame * program.portions_at(number + 1, first=False)
        convolving = max(computing, touched / elements_per_s) if computing else 0.0
        return convolving + moved / elements_per_s

    def seconds(self, op: int, rows: float, sides: Sides = WHOLE, *, first: bool) -> float:
        """As `clock.OpCosts.seconds`."""
        shrinking = (1 - self._fixed_share) * rows / self._rows
        seconds = self._whole[first][op] * (self._fixed_share + shrinking)
        if not seconds or not self._launch_s:
            return seconds
        key = op, rows, sides, first
        if key not in self._launches:
            self._launches[key] = self._launch_s * self._kernels(op, rows, sides, first=first)
        return max(seconds, self._launches[key])

    def _kernels(self, number: int, rows: float, sides: Sides, *, first: bool) -> int:
        """The kernels of one op for one chunk of `rows` latent rows."""
        op, portions = self._program.ops[number], self._program.portions_at(number + 1, first=first)
        frames = 1 if first else op.source.frames // portions
        elements = op.source.elements(self._shape, first=first) / portions * rows / self._rows
        return portions * op.kernels(frames, elements, sides, first=first)
