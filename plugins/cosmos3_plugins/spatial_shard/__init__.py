"""Each rank owns a slab of latent rows (or columns, or both) and runs every op on it.

Convolutions read a few rows beyond the slab, which neighbours send, and attention reads whole frames, which all
send to all; the finished bytes go to the root. Latent rows that do not divide by the ranks are dealt out as halves
or less where the picture is larger than the latent. Weights are on every rank. A single chunk is as parallel as a
long clip, so this is the choice for images. The method is that of DistVAE
(https://github.com/xdit-project/DistVAE), but frames cached for the next chunk keep their halos, and shard sizes
are computed, not gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

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
from cosmos3_plugins.spatial_shard.slabs import (
    Grid,
    Run,
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

__all__ = ["SpatialShard"]


@dataclass
class SpatialShard(Strategy):
    """Slabs of latent rows, columns, or both.

    axis: height (bands of rows), width (bands of columns), or grid: bands both ways, as nearly equal in size as
    the number of ranks allows. Bands have the fewest messages, a grid of many ranks the fewest bytes.
    """

    axis: Literal["height", "width", "grid"] = "height"

    name: ClassVar[str] = "spatial_shard"
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def grid(self, rows: int, cols: int, ranks: int) -> Grid:
        """One slab per rank on a latent of `rows` x `cols`. Raises StrategyError when one would be empty."""
        if self.axis not in ("height", "width", "grid"):
            raise StrategyError(
                f"spatial_shard.axis={self.axis}; a picture is cut into rows, columns, or both; "
                "give height, width or grid"
            )
        if self.axis == "height":
            choices = [(ranks, 1)]
        elif self.axis == "width":
            choices = [(1, ranks)]
        else:
            choices = [(down, ranks // down) for down in range(1, ranks + 1) if ranks % down == 0]
        fitting = [(down, across) for down, across in choices if down <= rows and across <= cols]
        if not fitting:
            raise StrategyError(self._too_many(rows, cols, ranks))
        # The smallest largest slab, and of those the one with the shortest cuts.
        down, across = min(
            fitting, key=lambda g: (-(-rows // g[0]) * -(-cols // g[1]), (g[0] - 1) * cols + (g[1] - 1) * rows)
        )
        return Grid.of(rows, cols, down, across)

    def _too_many(self, rows: int, cols: int, ranks: int) -> str:
        what = f"spatial_shard.axis={self.axis} over {ranks} ranks on a latent of {rows} rows and {cols} columns"
        if self.axis == "grid":
            return (
                f"{what}; no two numbers whose product is {ranks} fit into {rows} x {cols}, and each slab needs "
                f"one row and one column; use {self._most(rows, cols, ranks)} ranks, or a larger picture"
            )
        size, line = (rows, "row") if self.axis == "height" else (cols, "column")
        other, lines = ("width", cols) if self.axis == "height" else ("height", rows)
        works = f"use {size} ranks or fewer"
        if ranks <= lines:
            works += f", or axis={other}"
        return f"{what}; each rank needs one {line} and there are {size}; {works}"

    @staticmethod
    def _most(rows: int, cols: int, ranks: int) -> int:
        """The most ranks, fewer than `ranks`, that a grid of `rows` x `cols` latents has room for."""
        return max(d * a for d in range(1, rows + 1) for a in range(1, cols + 1) if d * a < ranks)

    def plan(self, program: Program, shape: LatentShape, ranks: int) -> StrategyPlan:
        """Who owns which rows and columns. Raises StrategyError for more ranks than there are of them."""
        grid = self.grid(shape.rows, shape.cols, ranks)
        run = run_of(program, grid)
        shares = tuple(self._share(program, shape, grid, run, rank) for rank in range(ranks))
        slowest = max(share.flops for share in shares)
        largest = grid.slab(ranks - 1)
        note = (
            f"{len(grid.rows)} x {len(grid.cols)} slabs, the largest {largest.height} x {largest.width} of "
            f"{shape.rows} x {shape.cols} latent rows and columns"
            f"{', dealt anew where the picture is larger' * bool(shares[0].deals)}: "
            f"at best {program.flops(shape) / slowest:.2f} times one rank"
        )
        return StrategyPlan(self.name, program.direction, self.exactness, shares, note)

    def _share(self, program: Program, shape: LatentShape, grid: Grid, run: Run, rank: int) -> RankShare:
        work = slab_work(program, shape, run, rank)
        sent = work.sent
        if program.direction == "encode":
            if len(grid) > 1:
                sent += Traffic(moments_bytes(program, work.leaving if rank else shape), 1)
        elif rank:
            sent += Traffic(picture_bytes(program, work.leaving), program.crossings(len(program), shape))
        slab = grid.slab(rank)
        return RankShare(
            rank=rank,
            ops=(0, len(program)),
            rows=slab.rows,
            cols=slab.cols,
            flops=work.flops,
            weight_bytes=program.weight_elements() * shape.element_bytes,
            activation_bytes=work.activation_bytes,
            sent_bytes=sent.bytes,
            sent_messages=sent.messages,
            deals=deals(program, grid, rank),
        )

    def runner(self, vae: BoundVae, comm: Comm, direction: Direction) -> Runner:
        """This rank's slab."""
        from cosmos3_plugins.spatial_shard.runner import ShardRunner

        return ShardRunner(vae, comm, direction, partial(self.grid, ranks=comm.size))
