"""Each rank owns a contiguous run of ops (a pipeline stage), and the latent frames stream through the ranks.

The decoder is causal, so several frames can be in flight in different stages. There is no halo and no gather of
feature maps. Every op runs on the same shape as on one rank, so the result is equal bit for bit.

With N ranks and T chunks the pipeline takes T + N - 1 steps. Late stages process a chunk in portions and start
when the first portion arrives, so each of them adds less than a step (`Program.portions_at`). The cuts between
neighbours may move from chunk to chunk, so that all ranks are busy to the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from cosmos3_pipeline.plugin_api import (
    Assignment,
    Block,
    ChunkCosts,
    Exactness,
    LatentShape,
    Program,
    Strategy,
    StrategyError,
    line_cuts,
    op_costs,
    op_seconds,
)

__all__ = ["LayerPipeline"]


@dataclass
class LayerPipeline(Strategy):
    """Runs of ops, divided such that a clip ends early.

    moving_cuts: cuts between ranks may move from chunk to chunk. They do if this shortens the clip by 1% per 10%
    of the weights that are then held twice, and by 0.3% at least.
    op_seconds: the vae.json of benchmarks/vae.py on this kind of machine, for decode in float32. The stages are
    then balanced with these times instead of a model that was fitted to one kind of processor.
    """

    moving_cuts: bool = True
    op_seconds: str = ""

    name: ClassVar[str] = "layer_pipeline"
    exactness: ClassVar[Exactness] = Exactness.BITWISE

    def assign(self, program: Program, shape: LatentShape, ranks: int) -> Assignment:
        """The run of ops of each rank. Raises StrategyError for more ranks than ops.

        Rank 0 has the last ops, so that the finished picture need not be sent. The last rank has the first ops.
        This costs nothing, because every rank has the input.
        """
        if ranks > len(program):
            raise StrategyError(
                f"layer_pipeline over {ranks} ranks",
                f"the {program.direction}r has {len(program)} ops and each rank needs one",
                f"use {len(program)} ranks or fewer",
            )
        chunks, costs = program.chunks(shape), _costs(program, shape, self.op_seconds)
        cuts = line_cuts(program, costs, ranks, chunks, moving=self.moving_cuts, on_host=shape.on_host)
        edges = [(0,) * chunks, *cuts.paths, (len(program),) * chunks]
        blocks = []
        for stage, (starts, stops) in enumerate(pairwise(edges)):
            blocks += [
                Block(ops, run, ranks - 1 - stage) for ops, run in _alike(list(zip(starts, stops, strict=True)))
            ]
        moves = ", with moving cuts" * cuts.move
        measured = ", by measured seconds of ops" * bool(self.op_seconds)
        note = f"{chunks} chunks through {ranks} stages{moves}{measured}"
        return Assignment.of(ranks, blocks, note, speed_up=cuts.speed_up)


def _costs(program: Program, shape: LatentShape, measured: str = "") -> ChunkCosts:
    pixels = shape.batch * shape.rows * shape.cols
    if measured:
        return op_seconds(measured).costs(program, pixels, shape.element_bytes)
    return op_costs(program, pixels, shape.element_bytes, on_host=shape.on_host)


def _alike(runs: list[tuple[int, int]]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(ops, chunks [start, stop)) of consecutive chunks with the same ops."""
    found: list[tuple[tuple[int, int], tuple[int, int]]] = []
    for chunk, ops in enumerate(runs):
        if found and found[-1][0] == ops:
            found[-1] = (ops, (found[-1][1][0], chunk + 1))
        else:
            found.append((ops, (chunk, chunk + 1)))
    return found
