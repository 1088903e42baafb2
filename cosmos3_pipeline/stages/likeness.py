"""How alike two pictures are: PSNR and SSIM of 8-bit frames."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

PEAK = 255.0
WINDOW = 7  # pixels a side of SSIM's uniform window, as scikit-image has it


@dataclass(frozen=True)
class Likeness:
    """How alike a clip is to a reference. `psnr_db` is None if all pixels are equal: it would be infinite."""

    identical: bool
    psnr_db: float | None
    ssim: float
    max_levels: int  # the largest difference of one value, in 0..255


def likeness(reference: Iterable[NDArray[np.uint8]], other: Iterable[NDArray[np.uint8]]) -> Likeness | None:
    """Compare frames [H, W, 3] one by one. None if the clips differ in size or number of frames."""
    squares, count, largest, similarities = 0.0, 0, 0, []
    for theirs, ours in zip_longest(reference, other):
        if theirs is None or ours is None or theirs.shape != ours.shape:
            return None
        difference = theirs.astype(np.int16) - ours
        largest = max(largest, int(np.abs(difference).max()))
        squares += float(np.square(difference, dtype=np.float64).sum())
        count += difference.size
        similarities.append(ssim(theirs, ours))
    psnr = None if squares == 0 else psnr_db(PEAK, squares / count)
    return Likeness(largest == 0, psnr, float(np.mean(similarities)), largest)


def psnr_db(value_range: float, mean_square: float) -> float:
    """The peak signal-to-noise ratio in dB of a mean squared error. It is infinite if the error is 0."""
    if mean_square in (0.0, math.inf):
        return math.inf if mean_square == 0.0 else -math.inf
    return 10 * math.log10(value_range**2 / mean_square)


def ssim(reference: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Structural similarity of two frames [H, W, 3], 1.0 for equal ones.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004), per channel,
    with a uniform window and sample covariance.
    """
    x, y = reference.astype(np.float64), other.astype(np.float64)
    sample = WINDOW**2 / (WINDOW**2 - 1)
    mean_x, mean_y = _means(x), _means(y)
    var_x = sample * (_means(x * x) - mean_x**2)
    var_y = sample * (_means(y * y) - mean_y**2)
    covariance = sample * (_means(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return float((luminance * structure).mean())


def _means(frame: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of every window that lies inside the frame, computed from running sums."""
    for axis in (0, 1):
        sums = np.cumsum(frame, axis=axis)
        zero = np.zeros_like(np.take(sums, [0], axis=axis))
        padded = np.concatenate([zero, sums], axis=axis)
        size = padded.shape[axis]
        upper = np.take(padded, range(WINDOW, size), axis=axis)
        frame = (upper - np.take(padded, range(size - WINDOW), axis=axis)) / WINDOW
    return frame
