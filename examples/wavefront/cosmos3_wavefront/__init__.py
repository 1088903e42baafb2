"""The ranks take the chunks of a clip in turn, and hand each other the frames that causal convolutions remember.

Settings and plan; imports no torch. The work is in `runner.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from cosmos3_pipeline.vae.footprint import activation_bytes
from cosmos3_pipeline.vae.ops import Op, TimeUp
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

if TYPE_CHECKING:
    from cosmos3_pipeline.distributed.comm import Comm
    from cosmos3_pipeline.vae.weights import BoundVae

__all__ = ["Wavefront"]


@dataclass
class Wavefront(Strategy):
    """Chunks dealt to the ranks in turn, one following the other through the layers like a wave.

    convs_per_message: how many causal convolutions a rank runs before it hands on what they remember. 1 lets the
    next rank follow most closely; more means fewer stops, at a longer distance.
    """

    convs_per_message: int = 1

    name: ClassVar[str] = "wavefront"
    exactness: ClassVar[Exactness] = Exactness.BITWISE

    def parts(self, program: Program) -> tuple[tuple[int, int], ...]:
        """Runs [start, stop) of ops that cover the program, each but the last ending in a causal convolution."""
        if self.convs_per_message < 1:
            raise StrategyError(
                f"wavefront.convs_per_message={self.convs_per_message}; a message follows one convolution or "
                "more; give 1 or more"
            )
        ends = [index + 1 for index, op in enumerate(program.ops) if op.cached_frames]
        cuts = [0, *ends[self.convs_per_message - 1 :: self.convs_per_message]]
        if cuts[-1] < len(program):
            cuts.append(len(program))
        return tuple(pairwise(cuts))

    def plan(self, program: Program, shape: LatentShape, ranks: int) -> StrategyPlan:
        """Who runs which chunks. Raises StrategyError for more ranks than chunks."""
        self.parts(program)
        chunks = program.chunks(shape)
        if ranks > chunks:
            raise StrategyError(
                f"wavefront over {ranks} ranks; the clip is {program.direction}d in {chunks} "
                f"chunk{'s' * (chunks > 1)} and each rank needs one; use {chunks} ranks or fewer, or a longer clip"
            )
        shares = tuple(self._share(program, shape, rank, ranks) for rank in range(ranks))
        note = (
            f"{chunks} chunks dealt to {ranks} ranks: at best {chunks / math.ceil(chunks / ranks):.2f} times one"
        )
        return StrategyPlan(self.name, program.direction, self.exactness, shares, note)

    def _share(self, program: Program, shape: LatentShape, rank: int, ranks: int) -> RankShare:
        chunks = program.chunks(shape)
        own = range(rank, chunks, ranks)
        flops = [sum(op.flops(shape, first=first) for op in program.ops) for first in (True, False)]
        sizes = {
            first: [math.prod(s) for op in program.ops if (s := remembered_shape(op, shape, first=first))]
            for first in (True, False)
        }
        sent = [size for chunk in own if ranks > 1 and chunk + 1 < chunks for size in sizes[chunk == 0]]
        messages, elements = len(sent), sum(sent)
        result = [result_elements(program, shape, first=chunk == 0) for chunk in own]
        sent_bytes = elements * shape.element_bytes
        if program.direction == "encode" and ranks > 1:
            messages, sent_bytes = messages + len(result), sent_bytes + sum(result) * shape.element_bytes
        elif rank:
            messages, sent_bytes = messages + len(result), sent_bytes + sum(result)  # one byte per value
        return RankShare(
            rank=rank,
            ops=(0, len(program)),
            rows=(0, shape.rows),
            cols=(0, shape.cols),
            flops=sum(flops[chunk > 0] for chunk in own),
            weight_bytes=program.weight_elements() * shape.element_bytes,
            activation_bytes=activation_bytes(program, shape),
            sent_bytes=sent_bytes,
            sent_messages=messages,
        )

    def runner(self, vae: BoundVae, comm: Comm, direction: Direction) -> Runner:
        """This rank's turns."""
        from cosmos3_wavefront.runner import Turns

        return Turns(vae, comm, direction, self.parts(vae.program(direction)))


def remembered_shape(op: Op, shape: LatentShape, *, first: bool) -> tuple[int, ...] | None:
    """[B, T, H, W, C] of what `op` keeps after a chunk, None when nothing. `first`: after the first chunk."""
    # The first chunk passes TimeUp unchanged and is not remembered: the next one sees zeros.
    if not op.cached_frames or (first and isinstance(op, TimeUp)):
        return None
    b, _, h, w, c = op.source.shape(shape, first=first)
    return b, op.cached_frames, h, w, c


def result_elements(program: Program, shape: LatentShape, *, first: bool) -> int:
    """Values of the picture or the moments that one chunk gives."""
    return program.ops[-1].target.elements(shape, first=first)
