"""A strategy of this project, as docs/plugins.md shows it."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

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


@dataclass
class Columns(Strategy):
    """Columns of the picture, as nearly equal as they can be."""

    name: ClassVar[str] = "columns"
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def assign(self, program: Program, shape: LatentShape, ranks: int) -> Assignment:
        """Each rank owns some columns. Raises StrategyError for more ranks than columns."""
        if ranks > shape.cols:
            raise StrategyError(
                f"columns over {ranks} ranks", f"there are {shape.cols}", f"use {shape.cols} or fewer"
            )
        edges = [shape.cols * i // ranks for i in range(ranks + 1)]
        ops, chunks = (0, len(program)), (0, program.chunks(shape))
        slabs = [Rect(0, shape.rows, left, right) for left, right in pairwise(edges)]
        return Assignment.of(ranks, [Block(ops, chunks, rank, slab) for rank, slab in enumerate(slabs)])
