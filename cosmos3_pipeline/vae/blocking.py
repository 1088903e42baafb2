"""Block sizes of kernels, shared by the kernels and the predictions of their memory and cost.

Imports no torch and no other module of the package.
"""

from __future__ import annotations

import math

# Float32 elements in one block of the fused norm and activation: half a megabyte, so that a block stays in a
# core's second-level cache during all passes.
NORM_BLOCK_ELEMENTS = 1 << 17
# An accelerator computes a norm of at most this many elements in one kernel: it takes less time than the launch of
# another (32 MB at 4.8 TB/s are 7 us), so the rows that other ranks wait for need not come first.
ONE_KERNEL_ELEMENTS = 1 << 23
# A convolution computes two frames at a time if two output frames have at least this many FLOPs and a frame has at
# least this many pixels. With fewer FLOPs, the four calls cost more than the arithmetic that they save. With fewer
# pixels, most of the time is spent on reading weights, and this method reads a third more weights. Timed with 12
# to 1024 channels.
_PAIR_FLOPS = 150_000_000
_PAIR_PIXELS = 48
# A pair of frames is computed in bands of rows of at most _BAND_ELEMENTS input or output elements (a megabyte), so
# that sums and differences stay in a cache. Each band reads all weights of the kernel. Kernels with more weights
# than _BAND_WEIGHTS are therefore not computed in bands.
_BAND_ELEMENTS = 1 << 18
_BAND_WEIGHTS = 1 << 17


def makes_frame_pairs(inputs: int, outputs: int, kernel: tuple[int, int, int], frames: int, pixels: int) -> bool:
    """Whether a convolution of `inputs` to `outputs` channels computes its `frames` of `pixels` two at a time.

    This needs a third fewer multiplications. It is used in float32 on CPU for batch 1 (`convolution.py`).
    """
    taps, rows, cols = kernel
    flops = 4 * inputs * outputs * taps * rows * cols * pixels
    enough = flops >= _PAIR_FLOPS and pixels >= _PAIR_PIXELS
    return taps == 3 and rows * cols > 1 and frames > 0 and frames % 2 == 0 and enough


def pair_band(inputs: int, outputs: int, kernel: tuple[int, int, int], rows: int, cols: int) -> int:
    """How many of the `rows` of a pair of frames form one band; the last band may have fewer."""
    _, height, width = kernel
    most = max(1, _BAND_ELEMENTS // (cols * max(inputs, outputs)))
    if inputs * outputs * height * width > _BAND_WEIGHTS or most >= rows:
        return rows
    return math.ceil(rows / math.ceil(rows / most))
