"""The distance between two results of the VAE, and the exactness that this distance reaches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cosmos3_pipeline.stages.likeness import psnr_db
from cosmos3_pipeline.vae.strategy import Exactness

PICTURE_RANGE = 2.0  # a float picture lies in [-1, 1]
# rounding in float32: at least this PSNR, and at most this difference of one value if values are in [-1, 1].
ROUNDING_DB = 100.0
ROUNDING_MAX_ABS = 1e-5
# rounding in a narrower dtype: the RMS distance from the float32 result is at most this factor times the distance
# of the reference in that dtype from the float32 result.
ROUNDING_RMS = 1.1
# approximate: two pictures show the same from this PSNR on. Two unrelated lively pictures have 12 dB.
APPROXIMATE_DB = 20.0


@dataclass
class Distance:
    """The distance over all tensors that were added. `value_range` is for PSNR, and is 2 for values in [-1, 1]."""

    value_range: float = PICTURE_RANGE
    equal: bool = True
    count: int = 0
    squares: float = 0.0
    total_abs: float = 0.0
    max_abs: float = 0.0

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Add two tensors of the same shape. A NaN counts as an infinite difference."""
        assert reference.shape == other.shape
        self.equal = self.equal and torch.equal(reference, other)
        difference = (other.double() - reference.double()).abs().nan_to_num_(nan=math.inf)
        self.count += difference.numel()
        self.squares += float(difference.square().sum())
        self.total_abs += float(difference.sum())
        self.max_abs = max(self.max_abs, float(difference.max()))

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / self.count)

    @property
    def mean_abs(self) -> float:
        return self.total_abs / self.count

    @property
    def psnr(self) -> float:
        """The PSNR in dB: infinite if all values are equal, minus infinite if a value is NaN."""
        return psnr_db(self.value_range, self.squares / self.count)


def exactness_of(
    found: Distance, *, float32: Distance | None = None, reference_float32: Distance | None = None
) -> Exactness | None:
    """The exactness of a result at distance `found` from the reference. None if it is another picture.

    In a dtype narrower than float32 the order of sums changes every digit, so `found` cannot show rounding. Two
    other distances decide instead: `float32`, from the float32 result to this result, and `reference_float32`,
    from the float32 result to the reference.
    """
    if found.equal:
        return Exactness.BITWISE
    if float32 is None or reference_float32 is None:
        largest = ROUNDING_MAX_ABS * found.value_range / PICTURE_RANGE
        if found.psnr >= ROUNDING_DB and found.max_abs <= largest:
            return Exactness.ROUNDING
    elif float32.rms <= ROUNDING_RMS * reference_float32.rms:
        return Exactness.ROUNDING
    return Exactness.APPROXIMATE if found.psnr >= APPROXIMATE_DB else None
