"""One stage on one rank: what it computes, holds and sends, and what bounds its time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cosmos3_pipeline.denoise.cost import Wire


@dataclass(frozen=True)
class RankStage:
    """One stage on one rank. `peak_bytes` is everything held at once; `seconds` by what would bound it alone."""

    flops: int
    activation_bytes: int
    peak_bytes: int
    sent: Wire
    seconds: dict[str, float]
    share: dict[str, Any]  # what it owns: tokens, or ops, rows and columns

    @property
    def total_seconds(self) -> float:
        """Compute and memory traffic overlap, the link does not."""
        return max(self.seconds["compute"], self.seconds["memory"]) + self.seconds["link"]

    @property
    def bound(self) -> str:
        """What takes longest: compute, memory or link."""
        return max(self.seconds, key=lambda part: self.seconds[part])
