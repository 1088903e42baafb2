"""How long a decode takes on ranks that are not there: a plan's shares played event by event.

What a rank does is read off its share of the plan, so a third party's strategy is simulated as well:

- Ranks with one run of ops, and slabs that make up the picture, are a shard group. They hand each other halo rows
  for every convolution and whole frames for attention.
- Groups whose runs follow each other are a line, through which the chunks pass.
- Ranks that each do everything, or whose picture is approximate, work on pieces that do not see each other.

The order of computing, sending and waiting is that of the runners: `Place` of layer_pipeline, `SlabExchange` and
`Collector` of spatial_shard, and the executor's norms, which compute first what a neighbour waits for. Not that of
its convolutions, which make what they can before they wait.
"""

from __future__ import annotations

from dataclasses import dataclass

from cosmos3_pipeline.plan.events import Clock, Link
from cosmos3_pipeline.plan.op_costs import EstimatedCosts, MeasuredCosts, OpCosts
from cosmos3_pipeline.plan.schedules import Line, Pieces, SimulationError, in_pieces
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.program import Program
from cosmos3_pipeline.vae.strategy import StrategyPlan

__all__ = [
    "EstimatedCosts",
    "Link",
    "MeasuredCosts",
    "Nodes",
    "OpCosts",
    "Simulated",
    "SimulationError",
    "simulate",
]


@dataclass(frozen=True)
class Nodes:
    """Ranks per node, and the link between ranks of different nodes."""

    ranks: int
    link: Link


@dataclass(frozen=True)
class Simulated:
    """One decode. Per rank: seconds that it computes, seconds that it waits, and what it sends.

    chunks: the second at which the root has each part of the picture that it hands out, as bytes.
    """

    chunks: tuple[float, ...]
    busy_s: tuple[float, ...]
    waiting_s: tuple[float, ...]
    sent_bytes: tuple[int, ...]
    sent_messages: tuple[int, ...]

    @property
    def seconds(self) -> float:
        """Until the root has the last chunk."""
        return self.chunks[-1]


def simulate(
    program: Program,
    shape: LatentShape,
    plan: StrategyPlan,
    costs: OpCosts,
    link: Link,
    *,
    nodes: Nodes | None = None,
    overlaps: bool = True,
) -> Simulated:
    """`ParallelVAE.decode_stream` of a clip of `shape` by the ranks of `plan`.

    `costs` are those of one rank; `link` joins ranks of a node (without `nodes`, all are on one).
    Unless `overlaps`, ranks do not compute while their messages are under way.
    Raises SimulationError for an encode, and for shares that do not tell what the ranks wait for.
    """
    if program.direction != "decode":
        raise SimulationError(
            f"a plan to {program.direction}; what is simulated is `decode_stream`; give a plan to decode"
        )

    def between(source: int, target: int) -> Link:
        apart = nodes is not None and source // nodes.ranks != target // nodes.ranks
        return nodes.link if nodes is not None and apart else link

    ranks = range(len(plan.shares))
    clock = Clock(len(ranks), between)
    schedule: Pieces | Line
    if in_pieces(program, shape, plan):
        schedule = Pieces(program, shape, plan, costs, clock)
    else:
        schedule = Line(program, shape, plan, costs, clock, overlaps=overlaps)
    clock.run([schedule.process(rank) for rank in ranks])
    return Simulated(
        chunks=tuple(schedule.done),
        busy_s=tuple(clock.busy),
        waiting_s=tuple(clock.waiting),
        sent_bytes=tuple(clock.sent_bytes),
        sent_messages=tuple(clock.sent_messages),
    )
