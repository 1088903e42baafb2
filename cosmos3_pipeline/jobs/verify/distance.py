"""How far one result of the VAE is from another, and which exactness that is: promises as numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cosmos3_pipeline.stages.likeness import psnr_db
from cosmos3_pipeline.vae.strategy import Exactness

PICTURE_RANGE = 2.0  # a float picture lies in [-1, 1]
# rounding, in float32. The second is the largest difference where values lie in [-1, 1].
ROUNDING_DB = 100.0
ROUNDING_MAX_ABS = 1e-5
# rounding, in a narrower dtype: as far from the float32 result as the reference in that dtype, with some room.
ROUNDING_RMS = 1.1
# approximate: two unrelated lively pictures are 12 dB apart; from here on they show the same.
APPROXIMATE_DB = 20.0


@dataclass
class Distance:
    """Of everything that was added so far. `value_range` is what PSNR relates to, 2 for pictures in [-1, 1]."""

    value_range: float = PICTURE_RANGE
    equal: bool = True
    count: int = 0
    squares: float = 0.0
    total_abs: float = 0.0
    max_abs: float = 0.0

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Count in two tensors of one shape; a NaN is infinitely far from anything."""
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
        """In dB, infinite where nothing differs, minus infinite where something is NaN."""
        return psnr_db(self.value_range, self.squares / self.count)


def exactness_of(
    found: Distance, *, float32: Distance | None = None, reference_float32: Distance | None = None
) -> Exactness | None:
    """What a result at distance `found` from the reference has reached; None when it is another picture.

    In a dtype narrower than float32 the order of sums shows in every digit, so rounding cannot be told from
    `found`: then `float32` and `reference_float32`, the distances of the result and of the reference from the
    result in float32, decide.
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
