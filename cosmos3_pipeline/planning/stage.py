"""One stage on one rank: what it computes, holds and sends, and what bounds its time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cosmos3_pipeline.denoise.cost import Wire


def total_seconds(bounds: dict[str, float]) -> float:
    """Of what bounds a stage: compute and memory traffic overlap, the link does not."""
    return max(bounds["compute"], bounds["memory"]) + bounds["link"]


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
        return total_seconds(self.seconds)

    @property
    def bound(self) -> str:
        """What takes longest: compute, memory or link."""
        return max(self.seconds, key=lambda part: self.seconds[part])
