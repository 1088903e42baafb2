"""Each rank owns a contiguous run of ops, and the latent frames stream through the ranks.

The decoder is causal, so frame after frame passes like workpieces on an assembly line: no halo, no gather of
feature maps, and every op runs on the shape on which one rank alone would run it, so the result is equal bit for
bit. With N ranks and T chunks the line is full for T of its T + N - 1 steps; fewer are added by the late stages,
which see a chunk in portions and begin with the first (`Program.waits`).
"""

from __future__ import annotations

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
)
from cosmos3_plugins.layer_pipeline.balance import LARGE_PIXELS, best_runs, op_costs, speed_up

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
    """

    flops_per_element: float = 50.0
    pixels: int = 0

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

    def runs(self, program: Program, shape: LatentShape, ranks: int) -> tuple[tuple[int, int], ...]:
        """The run [start, stop) of each rank for a clip of `shape`.

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
        return tuple(reversed(best_runs(program, ranks, self.flops_per_element, *sizes)))

    def plan(self, program: Program, shape: LatentShape, ranks: int) -> StrategyPlan:
        """Who owns which ops. Raises StrategyError for more ranks than ops."""
        runs = self.runs(program, shape, ranks)
        chunks = program.chunks(shape)
        shares = tuple(self._share(program, shape, rank, runs[rank], ranks) for rank in range(ranks))
        costs = op_costs(program, self.flops_per_element, self._pixels(shape), shape.element_bytes)
        stage = [sum(costs.later[start:stop]) for start, stop in runs]
        balance = sum(stage) / (ranks * max(stage))
        note = (
            f"{chunks} chunks through {ranks} stages, balance {balance:.0%}: "
            f"at best {speed_up(program, costs, runs, chunks):.2f} times one rank"
        )
        return StrategyPlan(self.name, program.direction, self.exactness, shares, note)

    def _share(
        self, program: Program, shape: LatentShape, rank: int, run: tuple[int, int], ranks: int
    ) -> RankShare:
        start, stop = run
        chunks = program.chunks(shape)
        peak = activation_bytes(program, shape, start, stop)
        if chunks > 1:
            # The next portion arrives, and the last one leaves, while this one is computed.
            crossing = [cut for cut in (start, stop) if 0 < cut < len(program)]
            peak += shape.element_bytes * sum(
                program.portion_elements(cut, shape, first=False) for cut in crossing
            )
        if stop < len(program):
            sent = program.carried_bytes(stop, shape)
            messages = program.crossings(stop, shape) * len(program.carried(stop))
        elif program.direction == "encode" and ranks > 1:
            moments = 2 * program.z_dim * shape.batch * shape.frames * shape.rows * shape.cols
            sent, messages = moments * shape.element_bytes, 1
        else:
            sent, messages = 0, 0
        return RankShare(
            rank=rank,
            ops=run,
            rows=(0, shape.rows),
            cols=(0, shape.cols),
            flops=program.flops(shape, start, stop),
            weight_bytes=program.weight_elements(start, stop) * shape.element_bytes,
            activation_bytes=peak,
            sent_bytes=sent,
            sent_messages=messages,
        )

    def runner(self, vae: BoundVae, comm: Comm, direction: Direction) -> Runner:
        """This rank's stage of the line, bound at once if its ops do not depend on the clip."""
        from cosmos3_plugins.layer_pipeline.runner import Stage

        return Stage(vae, comm, direction, self)
