"""Groups of ranks own runs of ops, as in `layer_pipeline`; in a group each rank owns rows, as in `spatial_shard`.

For more ranks than either can use well: a line of many stages fills slowly and balances badly, and a picture has
only so many rows. Every group has as many bands, cut as in `spatial_shard`, so a rank hands its band to one of the
next group, and nothing is put together before the root does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cosmos3_pipeline.vae.line_times import flops_until_end
from cosmos3_pipeline.vae.program import portions_under_way
from cosmos3_pipeline.vae.strategy import (
    Direction,
    Exactness,
    LatentShape,
    Program,
    RankShare,
    Runner,
    Strategy,
    StrategyError,
    StrategyPlan,
)
from cosmos3_plugins.layer_pipeline import LayerPipeline
from cosmos3_plugins.layer_pipeline.balance import best_runs
from cosmos3_plugins.layer_pipeline.costs import op_costs
from cosmos3_plugins.spatial_shard.slabs import (
    Grid,
    Traffic,
    deals,
    moments_bytes,
    picture_bytes,
    run_of,
    slab_work,
)

if TYPE_CHECKING:
    from cosmos3_pipeline.distributed.comm import Comm
    from cosmos3_pipeline.vae.weights import BoundVae

__all__ = ["PipelineOfShards"]


@dataclass
class PipelineOfShards(Strategy):
    """`groups` runs of ops, each on ranks / `groups` bands of latent rows.

    Group 0, with the root, has the last ops.
    """

    groups: int = 2

    name: ClassVar[str] = "pipeline_of_shards"
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def shards(self, ranks: int) -> int:
        """Ranks of each group. Raises StrategyError when they do not divide."""
        if self.groups < 1 or ranks % self.groups:
            fitting = [count for count in range(1, ranks + 1) if ranks % count == 0]
            raise StrategyError(
                f"pipeline_of_shards.groups={self.groups} over {ranks} ranks; every group has the same number of "
                f"ranks; use groups={min(fitting, key=lambda count: abs(count - self.groups))}, or a number of "
                f"ranks that divides by {max(1, self.groups)}"
            )
        return ranks // self.groups

    def runs(self, program: Program, element_bytes: int) -> tuple[tuple[int, int], ...]:
        """The run [start, stop) of each group, divided for large pictures of elements of so many bytes.

        Raises StrategyError for more groups than ops.
        """
        if self.groups > len(program):
            raise StrategyError(
                f"pipeline_of_shards.groups={self.groups}; the {program.direction}r has {len(program)} ops and "
                f"each group needs one; use {len(program)} groups or fewer"
            )
        costs = op_costs(program, LayerPipeline().flops_per_element, element_bytes=element_bytes)
        found = best_runs(program, self.groups, costs)
        return tuple(run.ops for run in reversed(found))

    def plan(self, program: Program, shape: LatentShape, ranks: int) -> StrategyPlan:
        """Who owns which ops and rows. Raises StrategyError for groups or rows that do not suffice."""
        shards = self.shards(ranks)
        runs = self.runs(program, shape.element_bytes)
        if shards > shape.rows:
            raise StrategyError(
                f"pipeline_of_shards.groups={self.groups} over {ranks} ranks on a latent of {shape.rows} rows; "
                f"the {shards} ranks of a group need a row each; use {self.groups * shape.rows} ranks or fewer, "
                "or more groups"
            )
        grid = Grid.of(shape.rows, shape.cols, shards, 1)
        shares = tuple(self._share(program, shape, grid, runs, rank) for rank in range(ranks))
        chunks = program.chunks(shape)
        bound = program.flops(shape) / flops_until_end(program, shape, shares)
        largest = grid.slab(shards - 1).height
        note = (
            f"{chunks} chunks through {self.groups} stages of {shards} bands, the largest {largest} of "
            f"{shape.rows} latent rows{', dealt anew where the picture is larger' * bool(shares[0].deals)}: "
            f"at best {bound:.2f} times one rank"
        )
        return StrategyPlan(self.name, program.direction, self.exactness, shares, note)

    def _share(
        self, program: Program, shape: LatentShape, grid: Grid, runs: tuple[tuple[int, int], ...], rank: int
    ) -> RankShare:
        group, index = divmod(rank, len(grid))
        start, stop = runs[group]
        work = slab_work(program, shape, run_of(program, grid, start, stop), index)
        peak, sent, slab = work.activation_bytes, work.sent, grid.slab(index)
        chunks = program.chunks(shape)
        if chunks > 1:
            # The next portion arrives, and those before leave, while this one is computed.
            under_way = portions_under_way(chunks, moving=False)
            for cut, part, portions in ((start, work.entering, 1), (stop, work.leaving, under_way)):
                if 0 < cut < len(program):
                    peak += portions * part.element_bytes * program.portion_elements(cut, part, first=False)
        if stop < len(program):
            messages = program.crossings(stop, shape) * len(program.carried(stop))
            sent += Traffic(program.carried_bytes(stop, work.leaving), messages)
        elif program.direction == "decode":
            if index:
                sent += Traffic(picture_bytes(program, work.leaving), program.crossings(len(program), shape))
        elif len(runs) * len(grid) > 1:
            sent += Traffic(moments_bytes(program, work.leaving if index else shape), 1)
        return RankShare(
            rank=rank,
            ops=(start, stop),
            rows=slab.rows,
            cols=slab.cols,
            flops=work.flops,
            weight_bytes=program.weight_elements(start, stop) * shape.element_bytes,
            activation_bytes=peak,
            sent_bytes=sent.bytes,
            sent_messages=sent.messages,
            deals=deals(program, grid, index),
        )

    def runner(self, vae: BoundVae, comm: Comm, direction: Direction) -> Runner:
        """This rank's stage and band."""
        from cosmos3_plugins.pipeline_of_shards.runner import ShardStage

        group = comm.rank // self.shards(comm.size)
        runs = self.runs(vae.program(direction), vae.dtype.itemsize)
        return ShardStage(vae, comm, direction, runs[group], groups=self.groups)
