"""Each rank owns a contiguous run of ops, and the latent frames stream through the ranks.

The cuts between neighbours may move from chunk to chunk, so that all are equally busy and busy to the end.

The decoder is causal, so frame after frame passes like workpieces on an assembly line: no halo, no gather of
feature maps, and every op runs on the shape on which one rank alone would run it, so the result is equal bit for
bit. With N ranks and T chunks the line is full for T of its T + N - 1 steps; fewer are added by the late stages,
which see a chunk in portions and begin with the first (`Program.portions_at`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

from cosmos3_pipeline.vae.footprint import activation_bytes
from cosmos3_pipeline.vae.line_times import ChunkCosts
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
from cosmos3_plugins.layer_pipeline.balance import Run, best_runs, speed_up
from cosmos3_plugins.layer_pipeline.costs import LARGE_PIXELS, op_costs
from cosmos3_plugins.layer_pipeline.measured import op_seconds
from cosmos3_plugins.layer_pipeline.moving import moving_runs
from cosmos3_plugins.layer_pipeline.passing import Passing

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
    moving_cuts: cuts between ranks may move from chunk to chunk, if a line then ends 0.3% sooner, and 1% more for
    each 10% of the weights that are then held twice: those of the ops over which cuts move.
    op_seconds: the bench.json of a job=bench on this kind of machine; ops are then divided by what they took there
    instead of by a model of them, which was fitted to one kind of processor. Of decode in float32 only.
    """

    flops_per_element: float = 50.0
    pixels: int = 0
    moving_cuts: bool = True
    op_seconds: str = ""

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
        costs = self._costs(program, shape)
        if self.moving_cuts:
            found = moving_runs(program, ranks, costs, program.chunks(shape))
        else:
            found = best_runs(program, ranks, costs)
        return tuple(reversed(found))

    def _costs(self, program: Program, shape: LatentShape) -> ChunkCosts:
        sizes = self._pixels(shape), shape.element_bytes
        if self.op_seconds:
            return op_seconds(self.op_seconds).costs(program, self.flops_per_element, *sizes)
        return op_costs(program, self.flops_per_element, *sizes)

    def plan(self, program: Program, shape: LatentShape, ranks: int) -> StrategyPlan:
        """Who owns which ops. Raises StrategyError for more ranks than ops."""
        runs = self.runs(program, shape, ranks)
        chunks = program.chunks(shape)
        shares = tuple(self._share(program, shape, rank, runs[rank], ranks) for rank in range(ranks))
        costs = self._costs(program, shape)
        stages = [sum(sum(costs.later[slice(*run.on(chunk))]) for chunk in range(chunks)) for run in runs]
        balance = sum(stages) / (ranks * max(stages))
        note = (
            f"{chunks} chunks through {ranks} stages, balance {balance:.0%}"
            f"{', with moving cuts' * any(len(set(run.runs)) > 1 for run in runs)}"
            f"{', by measured seconds of ops' * bool(self.op_seconds)}: "
            f"at best {speed_up(program, costs, runs, chunks):.2f} times one rank"
        )
        return StrategyPlan(self.name, program.direction, self.exactness, shares, note)

    def _share(self, program: Program, shape: LatentShape, rank: int, run: Run, ranks: int) -> RankShare:
        start, stop = run.ops
        chunks = program.chunks(shape)
        on = [run.on(chunk) for chunk in range(chunks)]
        if stop < len(program):
            passing = Passing(program, shape, on)
            tensors = [math.prod(each) for i in range(chunks) for each in chain.from_iterable(passing.leaving(i))]
            sent, messages = shape.element_bytes * sum(tensors), len(tensors)
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
            activation_bytes=_peak(program, shape, on, moving=bool(run.runs)),
            sent_bytes=sent,
            sent_messages=messages,
            runs=run.runs,
        )

    def runner(self, vae: BoundVae, comm: Comm, direction: Direction) -> Runner:
        """This rank's stage of the line, bound at once if its ops do not depend on the clip."""
        from cosmos3_plugins.layer_pipeline.runner import Stage

        return Stage(vae, comm, direction, self)


def _peak(program: Program, shape: LatentShape, runs: Sequence[tuple[int, int]], *, moving: bool) -> int:
    """Peak bytes beyond the weights of a rank that runs the ops `runs` on the chunks."""
    if len(runs) == 1:
        return activation_bytes(program, shape, *runs[0])
    most = portions_under_way(len(runs), moving=moving)
    passing = Passing(program, shape, runs)
    given, made = (
        [[sum(map(math.prod, tensors)) for tensors in portions(index)] for index in range(len(runs))]
        for portions in (passing.expected, passing.leaving)
    )
    coming, leaving = (list(chain.from_iterable(chunks)) for chunks in (given, made))
    peaks: dict[tuple[int, int], int] = {}
    begun_given, begun_made = len(given[0]), len(made[0])
    for index in range(1, len(runs)):
        start, stop = run = runs[index]
        # While a portion is computed the next arrives and those before leave, and what goes with it waits to.
        beside = sum(math.prod(program.kept_shape(op, shape)) for op in passing.handed_over(index))
        if passing.keeps_passed(index):
            beside += math.prod(program.kept_shape(stop, shape))
        if start > 0:
            beside += max(coming[begun_given + 1 : begun_given + 1 + len(given[index])], default=0)
        if stop < len(program):
            ends = range(begun_made, begun_made + len(made[index]))
            beside += max(sum(leaving[max(0, end - most) : end]) for end in ends)
        begun_given, begun_made = begun_given + len(given[index]), begun_made + len(made[index])
        peaks[run] = max(beside, peaks.get(run, 0))
    return max(
        activation_bytes(program, shape, *run) + shape.element_bytes * beside for run, beside in peaks.items()
    )
