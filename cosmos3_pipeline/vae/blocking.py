"""How large the pieces are in which kernels work: facts that the kernels, their memory and their cost share.

No torch here, nor any other module of the package.
"""

from __future__ import annotations

import math

# Float32 elements that the fused norm and activation works on at once: half a megabyte, so that its passes stay in
# a core's second-level cache.
NORM_BLOCK_ELEMENTS = 1 << 17
# A convolution computes two frames at a time if two output frames have at least this many FLOPs and a frame has at
# least this many pixels. With fewer FLOPs, the four calls cost more than the arithmetic that they save. With fewer
# pixels, most of the time is spent on reading weights, of which this method reads a third more. Timed with 12 to
# 1024 channels.
_PAIR_FLOPS = 150_000_000
_PAIR_PIXELS = 48
# Elements of a band of a frame, of its input or output, that a pair is made of at once: a megabyte, so that sums
# and differences stay in a cache. Kernels of more weights than this would be read too often.
_BAND_ELEMENTS = 1 << 18
_BAND_WEIGHTS = 1 << 17


def makes_frame_pairs(inputs: int, outputs: int, kernel: tuple[int, int, int], frames: int, pixels: int) -> bool:
    """Whether a convolution of `inputs` to `outputs` channels makes its `frames` of `pixels` two at a time.

    So it is in float32 on CPU, for a clip by itself (`convolution.py`), with a third fewer multiplications.
    """
    taps, rows, cols = kernel
    flops = 4 * inputs * outputs * taps * rows * cols * pixels
    enough = flops >= _PAIR_FLOPS and pixels >= _PAIR_PIXELS
    return taps == 3 and rows * cols > 1 and frames > 0 and frames % 2 == 0 and enough


def pair_band(inputs: int, outputs: int, kernel: tuple[int, int, int], rows: int, cols: int) -> int:
    """How many of the `rows` of a pair of frames are made at once; the last band may have fewer."""
    _, height, width = kernel
    most = max(1, _BAND_ELEMENTS // (cols * max(inputs, outputs)))
    if inputs * outputs * height * width > _BAND_WEIGHTS or most >= rows:
        return rows
    return math.ceil(rows / math.ceil(rows / most))
