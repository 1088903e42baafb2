"""Groups of ranks own runs of ops, as in `layer_pipeline`; in a group each rank owns rows, as in `spatial_shard`.

Choose it for more ranks than either strategy can use well: a pipeline of many stages fills slowly and balances
badly, and a picture has a limited number of rows. Every group has the same number of bands. Each rank therefore
sends its band to one rank of the next group, and only rank 0 assembles the picture.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from cosmos3_pipeline.plugin_api import Assignment, Exactness, LatentShape, Program, Strategy, StrategyError
from cosmos3_plugins.layer_pipeline import fixed_runs
from cosmos3_plugins.spatial_shard import shards

__all__ = ["PipelineOfShards"]


@dataclass
class PipelineOfShards(Strategy):
    """`groups` runs of ops, each on ranks / `groups` bands of latent rows.

    Group 0, with the root, has the last ops.
    """

    groups: int = 2

    name: ClassVar[str] = "pipeline_of_shards"
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def variants(self, ranks: int) -> Iterable[PipelineOfShards]:
        """Every number of groups that divides the ranks, with at least two groups and two ranks per group."""
        return [PipelineOfShards(groups) for groups in range(2, ranks) if ranks % groups == 0]

    def assign(self, program: Program, shape: LatentShape, ranks: int) -> Assignment:
        """The ops and rows of each rank. Raises StrategyError if ranks, rows or ops do not suffice."""
        if self.groups < 1 or ranks % self.groups:
            fitting = [count for count in range(1, ranks + 1) if ranks % count == 0]
            raise StrategyError(
                f"pipeline_of_shards.groups={self.groups} over {ranks} ranks",
                "every group has the same number of ranks",
                f"use groups={min(fitting, key=lambda count: abs(count - self.groups))}, or a number of ranks "
                "that "
                f"divides by {max(1, self.groups)}",
            )
        bands = ranks // self.groups
        if bands > shape.rows:
            raise StrategyError(
                f"pipeline_of_shards.groups={self.groups} over {ranks} ranks on a latent of {shape.rows} rows",
                f"the {bands} ranks of a group need a row each",
                f"use {self.groups * shape.rows} ranks or fewer, or more groups",
            )
        if self.groups > len(program):
            raise StrategyError(
                f"pipeline_of_shards.groups={self.groups}",
                f"the {program.direction}r has {len(program)} ops and each group needs one",
                f"use {len(program)} groups or fewer",
            )
        runs = fixed_runs(program, shape, self.groups)
        blocks = [
            block
            for group, run in enumerate(reversed(runs))
            for block in shards(program, shape, bands, 1, run, group * bands)
        ]
        note = f"{program.chunks(shape)} chunks through {self.groups} stages of {bands} bands"
        return Assignment.of(ranks, blocks, note)
