"""Each rank owns a contiguous run of ops, and the latent frames stream through the ranks.

Where no cut between two ops makes neighbours equally busy, they run the op there in turn, chunk by chunk.

The decoder is causal, so frame after frame passes like workpieces on an assembly line: no halo, no gather of
feature maps, and every op runs on the shape on which one rank alone would run it, so the result is equal bit for
bit. With N ranks and T chunks the line is full for T of its T + N - 1 steps; fewer are added by the late stages,
which see a chunk in portions and begin with the first (`Program.waits`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from cosmos3_pipeline.vae.footprint import activation_bytes
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
    ops_on,
)
from cosmos3_plugins.layer_pipeline.balance import Run, best_runs, speed_up
from cosmos3_plugins.layer_pipeline.costs import LARGE_PIXELS, op_costs

if TYPE_CHECKING:
    from cosmos3_pipeline.distributed.comm import Comm
    from cosmos3_pipeline.vae.weights import BoundVae

__all__ = ["LayerPipeline"]


@dataclass
class LayerPipeline(Strategy):
    """Runs of ops, divided such that a clip ends early.

    flops_per_element: the arithmetic that costs as much time as reading or writing one element; decides how much
    norms and other memory-bound ops weigh when the ops are divided.
    pixels: latent pixels of a frame that the ops are divided for; 0 means those of each clip. Where they are
    few, early ops, which have most of the weights, take as long as reading these takes. From 1024 pixels on the
    runs are always the same; before, clips of two sizes may need two divisions, for which weights are bound anew.
    takes_turns: neighbours may run the op between them in turn, if the line then ends 0.5% sooner. Both hold the
    weights of that op, and one sends the other the frames that it keeps.
    """

    flops_per_element: float = 50.0
    pixels: int = 0
    takes_turns: bool = True

    name: ClassVar[str] = "layer_pipeline"
    exactness: ClassVar[Exactness] = Exactness.BITWISE

    @property
    def depends_on_clip(self) -> bool:
        """Unless `pixels` says for which clips the runs are balanced."""
        return not self.pixels

    def settled(self, program: Program, shape: LatentShape, ranks: int) -> LayerPipeline:
        """Its runs are those for a clip of `shape`, whatever comes."""
        return replace(self, pixels=self._pixels(shape))

    def _pixels(self, shape: LatentShape) -> int:
        return min(LARGE_PIXELS, self.pixels or shape.batch * shape.rows * shape.cols)

    def runs(self, program: Program, shape: LatentShape, ranks: int) -> tuple[Run, ...]:
        """The run of each rank for a clip of `shape`.

        The root has the last ops, so that the finished picture need not be sent; the last rank has the first ones,
        since every rank has the input. Raises StrategyError for more ranks than ops.
        """
        if self.flops_per_element < 0:
            raise StrategyError(
                f"layer_pipeline.flops_per_element={self.flops_per_element} is negative; it is what touching an "
                "element costs beside its arithmetic; give 0 or more"
            )
        if self.pixels < 0:
            raise StrategyError(
                f"layer_pipeline.pixels={self.pixels} is negative; the runs are balanced for a frame of so many "
                "latent pixels; give 0 for those of each clip"
            )
        if ranks > len(program):
            raise StrategyError(
                f"layer_pipeline over {ranks} ranks; the {program.direction}r has {len(program)} ops and each "
                f"rank needs one; use {len(program)} ranks or fewer"
            )
        sizes = self._pixels(shape), shape.element_bytes
        found = best_runs(program, ranks, self.flops_per_element, *sizes, takes_turns=self.takes_turns)
        return tuple(reversed(found))

    def plan(self, program: Program, shape: LatentShape, ranks: int) -> StrategyPlan:
        """Who owns which ops. Raises StrategyError for more ranks than ops."""
        runs = self.runs(program, shape, ranks)
        chunks = program.chunks(shape)
        shares = tuple(self._share(program, shape, rank, runs[rank], ranks) for rank in range(ranks))
        costs = op_costs(program, self.flops_per_element, self._pixels(shape), shape.element_bytes)
        stages = [
            sum(sum(costs.later[slice(*ops_on(chunk, run.ops, run.turns))]) for chunk in range(chunks))
            for run in runs
        ]
        balance = sum(stages) / (ranks * max(stages))
        in_turn = len({one.op for run in runs for one in run.turns})
        note = (
            f"{chunks} chunks through {ranks} stages, balance {balance:.0%}"
            f"{f', {in_turn} of the ops between them in turn' * bool(in_turn)}: "
            f"at best {speed_up(program, costs, runs, chunks):.2f} times one rank"
        )
        return StrategyPlan(self.name, program.direction, self.exactness, shares, note)

    def _share(self, program: Program, shape: LatentShape, rank: int, run: Run, ranks: int) -> RankShare:
        start, stop = run.ops
        chunks = program.chunks(shape)
        on = [ops_on(chunk, run.ops, run.turns) for chunk in range(chunks)]
        peak = activation_bytes(program, shape, start, stop)
        if chunks > 1:
            # The next portion arrives, and the last one leaves, while this one is computed.
            for cuts in zip(*on[1:], strict=True):
                peak += shape.element_bytes * max(
                    program.portion_elements(cut, shape, first=False) if 0 < cut < len(program) else 0
                    for cut in cuts
                )
        if stop < len(program):
            tensors = list(_handed_on(program, shape, run))
            sent, messages = shape.element_bytes * sum(map(math.prod, tensors)), len(tensors)
        elif program.direction == "encode" and ranks > 1:
            moments = 2 * program.z_dim * shape.batch * shape.frames * shape.rows * shape.cols
            sent, messages = moments * shape.element_bytes, 1
        else:
            sent, messages = 0, 0
        return RankShare(
            rank=rank,
            ops=run.ops,
            rows=(0, shape.rows),
            cols=(0, shape.cols),
            flops=sum(
                op.flops(shape, first=chunk == 0)
                for chunk, ops in enumerate(on)
                for op in program.ops[slice(*ops)]
            ),
            weight_bytes=program.weight_elements(start, stop) * shape.element_bytes,
            activation_bytes=peak,
            sent_bytes=sent,
            sent_messages=messages,
            turns=run.turns,
        )

    def runner(self, vae: BoundVae, comm: Comm, direction: Direction) -> Runner:
        """This rank's stage of the line, bound at once if its ops do not depend on the clip."""
        from cosmos3_plugins.layer_pipeline.runner import Stage

        return Stage(vae, comm, direction, self)


def _handed_on(program: Program, shape: LatentShape, run: Run) -> Iterator[tuple[int, ...]]:
    """The shapes of the tensors of a whole clip that the rank of `run` sends to the next one."""
    for chunk in range(program.chunks(shape)):
        first = chunk == 0
        _, cut = ops_on(chunk, run.ops, run.turns)
        for _ in range(program.portions_at(cut, first=first)):
            yield from program.carried_shapes(cut, shape, first=first)
        for one in run.turns:
            kept = program.kept_shape(one.op, shape)
            if kept and one.op != run.ops[0] and one.hands_over(chunk):
                yield kept
