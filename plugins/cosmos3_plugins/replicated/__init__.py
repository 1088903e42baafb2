"""Every rank does all of it: the reference that the other strategies are held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cosmos3_pipeline.vae.footprint import activation_bytes
from cosmos3_pipeline.vae.strategy import (
    Direction,
    Exactness,
    LatentShape,
    Program,
    RankShare,
    Runner,
    Strategy,
    StrategyPlan,
)

if TYPE_CHECKING:
    from cosmos3_pipeline.distributed.comm import Comm
    from cosmos3_pipeline.vae.weights import BoundVae

__all__ = ["Replicated"]


@dataclass
class Replicated(Strategy):
    """All ops on the whole picture, on every rank, with nothing sent."""

    name: ClassVar[str] = "replicated"
    exactness: ClassVar[Exactness] = Exactness.BITWISE
    everywhere: ClassVar[bool] = True

    def plan(self, program: Program, shape: LatentShape, ranks: int) -> StrategyPlan:
        """Equal shares of everything; refuses nothing."""
        flops = program.flops(shape)
        weight_bytes = program.weight_elements() * shape.element_bytes
        peak = activation_bytes(program, shape)
        shares = tuple(
            RankShare(
                rank=rank,
                ops=(0, len(program)),
                rows=(0, shape.rows),
                cols=(0, shape.cols),
                flops=flops,
                weight_bytes=weight_bytes,
                activation_bytes=peak,
                sent_bytes=0,
                sent_messages=0,
            )
            for rank in range(ranks)
        )
        note = "one rank does all" if ranks == 1 else f"{ranks} ranks each do all; no speed-up"
        return StrategyPlan(self.name, program.direction, self.exactness, shares, note)

    def runner(self, vae: BoundVae, comm: Comm, direction: Direction) -> Runner:
        """All ops of `direction` on this rank."""
        from cosmos3_plugins.replicated.runner import ReplicatedRunner

        return ReplicatedRunner(vae, direction)
