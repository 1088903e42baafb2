"""Groups of ranks own runs of ops, as in `layer_pipeline`; in a group each rank owns rows, as in `spatial_shard`.

Choose it for more ranks than either strategy can use well: a pipeline of many stages fills slowly and balances
badly, and a picture has a limited number of rows. Groups may differ in size, because a group of few ranks is best
where the picture is small and slabs are not worth their halos and launches. Groups of equal size send less: each
rank sends its band to one rank of the next group. Only rank 0 assembles the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import ClassVar

from cosmos3_pipeline.plugin_api import (
    Assignment,
    Exactness,
    LatentShape,
    Program,
    Strategy,
    StrategyError,
    slab_costs,
)
from cosmos3_plugins.spatial_shard import shards

__all__ = ["PipelineOfShards"]

# Groups of unequal size must make the slowest group this much faster.
_GAIN = 1.01
# The ranks are divided among the groups in about this many parts.
_PARTS = 16

_Runs = tuple[tuple[int, int], ...]  # the size of each group and the op behind its last


@dataclass
class PipelineOfShards(Strategy):
    """`groups` runs of ops, each on bands of latent rows. Group 0, with the root, has the last ops."""

    groups: int = 2

    name: ClassVar[str] = "pipeline_of_shards"
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def variants(self, ranks: int) -> Iterable[PipelineOfShards]:
        """Two to four groups, and every number that divides the ranks, with at least two ranks per group."""
        counts = {*range(2, min(5, ranks)), *(n for n in range(2, ranks) if ranks % n == 0)}
        return [PipelineOfShards(groups) for groups in sorted(counts)]

    def assign(self, program: Program, shape: LatentShape, ranks: int) -> Assignment:
        """The ops and rows of each rank. Raises StrategyError if ranks, rows or ops do not suffice."""
        most = min(ranks, len(program))
        if not 1 <= self.groups <= most:
            raise StrategyError(
                f"pipeline_of_shards.groups={self.groups} over {ranks} ranks",
                f"each group needs a rank and one of the {len(program)} ops of the {program.direction}r",
                f"use 1 to {most} groups",
            )
        runs = _runs(program, shape, ranks, self.groups)
        if not runs:
            raise StrategyError(
                f"pipeline_of_shards.groups={self.groups} over {ranks} ranks on a latent of {shape.rows} rows",
                "each rank of a group needs a row",
                f"use {self.groups * shape.rows} ranks or fewer, or more groups",
            )
        blocks, start, below = [], 0, ranks
        for bands, stop in runs:
            below -= bands
            blocks += shards(program, shape, bands, 1, (start, stop), below)
            start = stop
        sizes = " + ".join(str(bands) for bands, _ in runs)
        note = f"{program.chunks(shape)} chunks through {self.groups} stages of {sizes} bands"
        return Assignment.of(ranks, blocks, note)


@cache
def _runs(program: Program, shape: LatentShape, ranks: int, groups: int) -> _Runs:
    """The groups whose slowest takes the least time; empty if there are more ranks than rows."""
    per, more = ranks / groups, program.chunks(shape) - 1

    @cache
    def before(bands: int) -> list[float]:
        first, later = slab_costs(program, shape, bands)
        return [0.0, *accumulate(one + more * other for one, other in zip(first, later, strict=True))]

    most, coarse = min(ranks, shape.rows), max(1, ranks // max(_PARTS, groups))
    even = _divided(ranks, groups, [ranks // groups] * (per == int(per) <= most), len(program), before)
    # A limit saves most of the time. Twice the time of a perfect division nearly always suffices.
    limits = [even[0] / _GAIN] if even[1] else [2 * before(1)[-1] / ranks, math.inf]
    for step in (coarse,) if even[1] else (coarse, 1):
        sizes = {size for size in range(1, most + 1) if size % step in (0, ranks % step)}
        for limit in limits:
            if found := _divided(ranks, groups, sizes, len(program), before, limit)[1]:
                return found
    return even[1]


def _divided(
    ranks: int,
    groups: int,
    sizes: Iterable[int],
    ops: int,
    before: Callable[[int], list[float]],
    limit: float = math.inf,
) -> tuple[float, _Runs]:
    """(the time of the slowest group, the groups), with sizes out of `sizes` that add up to `ranks`.

    before: the time of the ops before each op on that many bands.
    limit: slower groups are left out. The result is (infinity, ()) if nothing is left.
    """
    nowhere: tuple[float, _Runs] = (math.inf, ())
    best = {(0, 0): (0.0, _Runs())}  # by ranks and ops that are used up
    for _ in range(groups):
        found: dict[tuple[int, int], tuple[float, _Runs]] = {}
        for bands in sizes:
            times = before(bands)
            for (used, start), (slowest, runs) in best.items():
                if used + bands > ranks:
                    continue
                for stop in range(start + 1, ops + 1):
                    time = max(slowest, times[stop] - times[start])
                    if time >= limit:
                        break  # times grow with `stop`
                    if time < found.get((used + bands, stop), nowhere)[0]:
                        found[used + bands, stop] = time, (*runs, (bands, stop))
        best = found
    return best.get((ranks, ops), nowhere)
