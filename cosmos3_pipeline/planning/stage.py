"""One stage on one rank: what it computes, holds and sends, and what bounds its time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from cosmos3_pipeline.denoise.cost import Wire


def total_seconds(bounds: dict[str, float]) -> float:
    """Seconds of a stage. Weights are copied and memory is read during compute; messages add their time."""
    return max(bounds["compute"], bounds["memory"], bounds.get("weights", 0.0)) + bounds["link"]


@dataclass(frozen=True)
class RankStage:
    """One stage on one rank. `seconds` has the time of each bound alone: compute, memory, weights, link.

    `weight_bytes` and `text_bytes` (the prompts' keys and values) are held throughout. `activation_bytes` is the
    peak of all else.
    `sent_ahead` is the part of `sent` that already serves the next clip. A later clip does not send it again if
    the weights stay on the device.
    `noise_bytes` is the noise that the steps of a distilled checkpoint draw on the host and copy to the device.
    """

    flops: int
    weight_bytes: int
    text_bytes: int
    activation_bytes: int
    sent: Wire
    seconds: dict[str, float]
    share: dict[str, Any]  # what the rank owns: tokens, or ops, rows and columns
    sent_ahead: Wire = field(default_factory=Wire)
    noise_bytes: int = 0

    def times(self, count: int) -> RankStage:
        """This stage `count` times, one after the other."""
        seconds = {bound: each * count for bound, each in self.seconds.items()}
        return replace(self, flops=self.flops * count, sent=self.sent * count, seconds=seconds)

    def then(self, other: RankStage) -> RankStage:
        """This stage, then `other`, which is the same stage of a later chunk."""
        return replace(
            self,
            flops=self.flops + other.flops,
            activation_bytes=max(self.activation_bytes, other.activation_bytes),
            sent=self.sent + other.sent,
            seconds={bound: each + other.seconds[bound] for bound, each in self.seconds.items()},
        )

    @property
    def peak_bytes(self) -> int:
        """Everything that the rank holds at once in this stage."""
        return self.weight_bytes + self.text_bytes + self.activation_bytes

    @property
    def total_seconds(self) -> float:
        return total_seconds(self.seconds)

    @property
    def bound(self) -> str:
        """The bound that takes longest: compute, memory, weights or link."""
        return max(self.seconds, key=lambda part: self.seconds[part])
