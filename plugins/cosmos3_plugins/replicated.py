"""Every rank computes everything. This is the reference for the other strategies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cosmos3_pipeline.plugin_api import EVERY, Assignment, Block, Exactness, LatentShape, Program, Strategy

__all__ = ["Replicated"]


@dataclass
class Replicated(Strategy):
    """All ops on the whole picture, on every rank, with nothing sent."""

    name: ClassVar[str] = "replicated"
    exactness: ClassVar[Exactness] = Exactness.BITWISE

    def assign(self, program: Program, shape: LatentShape, ranks: int) -> Assignment:
        """One block for every rank; refuses nothing."""
        note = "" if ranks == 1 else f"{ranks} ranks each do all"
        return Assignment.of(ranks, [Block((0, len(program)), (0, program.chunks(shape)), EVERY)], note)
