"""The ranks take the chunks of a clip in turn, and the chunks follow each other through the layers like a wave.

Each rank sends the temporal caches of its causal convolutions to the next rank. The library derives these
messages, their times and their bytes by itself. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from cosmos3_pipeline.plugin_api import (
    Assignment,
    Block,
    Exactness,
    LatentShape,
    Program,
    Strategy,
    StrategyError,
)

__all__ = ["Wavefront"]


@dataclass
class Wavefront(Strategy):
    """The ranks take chunks in turn, `in_a_row` of them at a time.

    With 1 the next rank follows most closely. With more, fewer temporal caches are sent, but the next rank starts
    later.
    """

    in_a_row: int = 1

    name: ClassVar[str] = "wavefront"
    exactness: ClassVar[Exactness] = Exactness.BITWISE

    def assign(self, program: Program, shape: LatentShape, ranks: int) -> Assignment:
        """Assign chunks to ranks. Raises StrategyError for more ranks than turns."""
        if self.in_a_row < 1:
            raise StrategyError(
                f"wavefront.in_a_row={self.in_a_row}", "a turn is one chunk or more", "give 1 or more"
            )
        chunks = program.chunks(shape)
        turns = math.ceil(chunks / self.in_a_row)
        if ranks > turns:
            raise StrategyError(
                f"wavefront over {ranks} ranks",
                f"the clip is {program.direction}d in {chunks} chunks, {turns} turns, and each rank needs one",
                f"use {turns} ranks or fewer, or a longer clip",
            )
        blocks = [
            Block((0, len(program)), (start, min(start + self.in_a_row, chunks)), turn % ranks)
            for turn, start in enumerate(range(0, chunks, self.in_a_row))
        ]
        return Assignment.of(ranks, blocks, f"{turns} turns dealt to {ranks} ranks")
