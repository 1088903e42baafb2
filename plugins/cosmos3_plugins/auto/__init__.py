"""The strategy that the plan's cost model finds fastest for a clip, among the installed that are exact enough.

The estimate is that of `job=plan`: the slowest rank's time, with the wait until a line of stages is full. It knows
FLOPs, bytes and messages, not what a machine really does: `job=verify` times strategies side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, cast

from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.vae.strategy import (
    Direction,
    Exactness,
    LatentShape,
    Program,
    Runner,
    Strategy,
    StrategyError,
    StrategyPlan,
)

if TYPE_CHECKING:
    from cosmos3_pipeline.distributed.comm import Comm
    from cosmos3_pipeline.vae.weights import BoundVae

__all__ = ["Auto"]


@dataclass(frozen=True)
class _Candidate:
    name: str
    strategy: Strategy
    plan: StrategyPlan
    seconds: float

    @property
    def order(self) -> tuple[float, int, int, str]:
        """Fastest first; of equally fast ones the more exact, then the one that sends less."""
        sent = sum(share.sent_bytes for share in self.plan.shares)
        return self.seconds, list(Exactness).index(self.plan.exactness), sent, self.name


@dataclass
class Auto(Strategy):
    """`require`: the least exactness to choose from. The rest are the figures of one rank's accelerator and links.

    In the units of `topology.accelerator`; the defaults are those of a CPU core with ranks on one machine.
    Candidates have their default settings.
    """

    require: str = "bitwise"
    fp32_tflops: float = 0.1
    bf16_tflops: float = 0.2
    efficiency: float = 1.0
    memory_gb_per_s: float = 10.0
    link_gb_per_s: float = 2.0
    network_gb_per_s: float = 1.0
    latency_us: float = 100.0
    ranks_per_node: int = 8

    name: ClassVar[str] = "auto"
    exactness: ClassVar[Exactness] = Exactness.BITWISE  # by default; a plan says what was picked
    picks: ClassVar[bool] = True

    def settled(self, program: Program, shape: LatentShape, ranks: int) -> Strategy:
        """The strategy that is picked for a clip of `shape`, itself settled for it."""
        return self._ranking(program, shape, ranks)[0].strategy.settled(program, shape, ranks)

    def plan(self, program: Program, shape: LatentShape, ranks: int) -> StrategyPlan:
        """The plan of the strategy that is picked; its note says why. Raises StrategyError for bad settings."""
        best, *others = self._ranking(program, shape, ranks)
        note = f"picked {best.name}, {best.plan.exactness}: about {best.seconds:.3g} s"
        if others:
            note += f", against {', '.join(f'{other.seconds:.3g} s with {other.name}' for other in others)}"
        return replace(best.plan, strategy=f"auto: {best.name}", note=f"{note}; {best.plan.note}")

    def runner(self, vae: BoundVae, comm: Comm, direction: Direction) -> Runner:
        """Binds the picked strategy when the first clip is there to pick for."""
        from cosmos3_plugins.auto.runner import PickingRunner

        return PickingRunner(vae, comm, direction, self)

    def _ranking(self, program: Program, shape: LatentShape, ranks: int) -> list[_Candidate]:
        """What could be picked, best first."""
        from cosmos3_pipeline.config.plugins import discover

        required = self._required()
        found = []
        for name, cls in discover().strategies.items():
            strategy_class = cast(type[Strategy], cls)
            fits = program.direction in strategy_class.directions and strategy_class.exactness.satisfies(required)
            if strategy_class.picks or not fits:
                continue
            strategy = strategy_class()
            try:
                plan = strategy.plan(program, shape, ranks)
            except (StrategyError, Refusal):
                continue  # it cannot do this clip on so many ranks
            found.append(_Candidate(name, strategy, plan, self._seconds(program, shape, plan)))
        if not found:
            raise StrategyError(
                f"auto.require={self.require} on a latent of {shape.rows} x {shape.cols}; no installed strategy "
                f"that is {required} can {program.direction} it on {ranks} ranks; install replicated, which can"
            )
        return sorted(found, key=lambda candidate: candidate.order)

    def _required(self) -> Exactness:
        try:
            return Exactness(self.require)
        except ValueError:
            raise StrategyError(
                f"auto.require={self.require}; it is no exactness; use one of {', '.join(Exactness)}"
            ) from None

    def _seconds(self, program: Program, shape: LatentShape, plan: StrategyPlan) -> float:
        """Estimated seconds of the slowest rank."""
        from cosmos3_pipeline.config.schema import Dtype
        from cosmos3_pipeline.plan.hardware import GIGA, MICRO, TERA, Accelerator
        from cosmos3_pipeline.plan.stage import total_seconds
        from cosmos3_pipeline.plan.vae import VaeStage

        accelerator = Accelerator(
            name="",
            memory_bytes=0.0,
            flops_per_s={Dtype.bfloat16: self.bf16_tflops * TERA, Dtype.float32: self.fp32_tflops * TERA},
            memory_bytes_per_s=self.memory_gb_per_s * GIGA,
            link_bytes_per_s=self.link_gb_per_s * GIGA,
            network_bytes_per_s=self.network_gb_per_s * GIGA,
            latency_s=self.latency_us * MICRO,
            overhead_s=0.0,
            efficiency={"vae": self.efficiency},
        )
        stage = VaeStage(program, shape, plan)
        dtype = Dtype.bfloat16 if shape.element_bytes == 2 else Dtype.float32
        crosses = len(plan.shares) > self.ranks_per_node
        ranks = range(len(plan.shares))
        return max(total_seconds(stage.bounds(r, accelerator, dtype, crosses_nodes=crosses)) for r in ranks)
