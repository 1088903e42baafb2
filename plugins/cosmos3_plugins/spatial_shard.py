"""Each rank owns a slab of latent rows (or columns, or both) and runs every op on it.

Convolutions read a few rows beyond the slab (the halo), which neighbours send. Attention reads whole frames, so
every rank sends its slab to every other rank. Finished bytes are sent to rank 0. Where the picture is larger than
the latent, a cut may lie within a latent row, if this makes the largest slab smaller. For example, 11 latent rows
on two ranks become 5.5 and 5.5 rows. Every rank has all weights. A single chunk is as parallel as a long clip, so
choose this strategy for images.

The method is that of DistVAE (https://github.com/xdit-project/DistVAE), with two differences: frames cached for
the next chunk keep their halos, and shard sizes are computed instead of gathered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from cosmos3_pipeline.plugin_api import (
    Assignment,
    Block,
    Exactness,
    LatentShape,
    Program,
    Rect,
    Strategy,
    StrategyError,
)

__all__ = ["SpatialShard", "shards"]


@dataclass
class SpatialShard(Strategy):
    """Slabs of latent rows, columns, or both.

    axis: height (bands of rows), width (bands of columns), or grid (both, with slabs as equal in size as the
    number of ranks allows). Bands need the fewest messages, and a grid of many ranks the fewest bytes.
    """

    axis: Literal["height", "width", "grid"] = "height"

    name: ClassVar[str] = "spatial_shard"
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def assign(self, program: Program, shape: LatentShape, ranks: int) -> Assignment:
        """One slab for each rank. Raises StrategyError if there are more ranks than rows or columns."""
        down, across = self._grid(shape.rows, shape.cols, ranks)
        blocks = shards(program, shape, down, across)
        finer = "" if len(blocks) == ranks else ", cut finer where the picture is larger"
        note = f"{down} x {across} slabs of {shape.rows} x {shape.cols} latent rows and columns{finer}"
        return Assignment.of(ranks, blocks, note)

    def variants(self, ranks: int) -> Iterable[SpatialShard]:
        """Every axis."""
        return [SpatialShard("height"), SpatialShard("width"), SpatialShard("grid")]

    def _grid(self, rows: int, cols: int, ranks: int) -> tuple[int, int]:
        """(down, across): the numbers of slabs. Raises StrategyError if a slab would be empty."""
        choices = {
            "height": [(ranks, 1)],
            "width": [(1, ranks)],
            "grid": [(down, ranks // down) for down in range(1, ranks + 1) if ranks % down == 0],
        }
        if self.axis not in choices:
            raise StrategyError(
                f"spatial_shard.axis={self.axis}",
                "a picture is cut into rows, columns, or both",
                "give height, width or grid",
            )
        fitting = [(down, across) for down, across in choices[self.axis] if down <= rows and across <= cols]
        if not fitting:
            fits = max(d * a for d in range(1, rows + 1) for a in range(1, cols + 1) if d * a <= ranks)
            most = {"height": rows, "width": cols, "grid": fits}[self.axis]
            raise StrategyError(
                f"spatial_shard.axis={self.axis} over {ranks} ranks on a latent of {rows} rows and {cols} columns",
                "each rank needs a row and a column of its own",
                f"use {most} ranks or fewer, another axis, or a larger picture",
            )
        # The grid whose largest slab is smallest. If several are equal, the grid with the shortest cuts.
        return min(
            fitting, key=lambda g: (-(-rows // g[0]) * -(-cols // g[1]), (g[0] - 1) * cols + (g[1] - 1) * rows)
        )


def shards(
    program: Program,
    shape: LatentShape,
    down: int,
    across: int,
    ops: tuple[int, int] | None = None,
    first_rank: int = 0,
) -> list[Block]:
    """Blocks of `ops` (None: all) on `down` x `across` slabs, in row-major order on ranks from `first_rank` on.

    The slabs of the latent stay the same at all scales of the picture. They change only where finer cuts make the
    largest slab smaller.
    """
    start, stop = ops or (0, len(program))
    grid = _grid_of(shape, down, across, 1)
    by_stretch: dict[tuple[int, int], tuple[list[Rect], int]] = {}
    for a, b, unit in sorted(_stretches(program), key=lambda stretch: stretch[2]):
        finer = _grid_of(shape, down, across, unit)
        if _largest(finer) < _largest(grid):
            grid = finer
        by_stretch[a, b] = grid
    merged: list[tuple[int, int, tuple[list[Rect], int]]] = []
    for (a, b), one in sorted(by_stretch.items()):
        if merged and merged[-1][2] is one:
            merged[-1] = (merged[-1][0], b, one)
        else:
            merged.append((a, b, one))
    return [
        Block((max(a, start), min(b, stop)), (0, program.chunks(shape)), first_rank + i, rect, unit)
        for a, b, (rects, unit) in merged
        if a < stop and b > start
        for i, rect in enumerate(rects)
    ]


def _stretches(program: Program) -> Iterator[tuple[int, int, int]]:
    """(start, stop, unit) of stretches of the program in which cuts lie at multiples of 1/`unit` of a latent row.

    No shortcut is open between two stretches, so only the activation has to be re-sharded there.
    """
    begin = 0
    for end in range(1, len(program) + 1):
        if len(program.carried(end)) == 1:
            yield begin, end, min(s for op in program.ops[begin:end] for s in (op.source.scale, op.target.scale))
            begin = end


def _grid_of(shape: LatentShape, down: int, across: int, unit: int) -> tuple[list[Rect], int]:
    """Slabs in units of 1/`unit` latent row, whose heights and widths differ by at most one unit."""
    # Rounding down makes the first slabs smaller, because rank 0 also writes the picture.
    rows, cols = (
        [size * unit * i // parts for i in range(parts + 1)]
        for size, parts in ((shape.rows, down), (shape.cols, across))
    )
    return [Rect(*r, *c) for r in pairwise(rows) for c in pairwise(cols)], unit


def _largest(grid: tuple[list[Rect], int]) -> float:
    return max(rect.area for rect in grid[0]) / grid[1] ** 2
