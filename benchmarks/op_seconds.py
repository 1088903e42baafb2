"""Measures the seconds of each op of the decoder on this machine, within a decode by one rank.

`layer_pipeline.op_seconds` balances pipeline stages with them, and the clock of benchmarks/simulate.py can use
them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.distributed import ProcessGroup

from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.vae.assignment import Assignment, Block
from cosmos3_pipeline.vae.bound_ops import BoundOp, Flow
from cosmos3_pipeline.vae.execute import Execution
from cosmos3_pipeline.vae.frames import HaloExchange
from cosmos3_pipeline.vae.lowering import lower
from cosmos3_pipeline.vae.ops import LatentShape, Op, Room
from cosmos3_pipeline.vae.pixels import latent_chunk
from cosmos3_pipeline.vae.weights import BoundVae, ModuleWeights

CHUNKS = 4  # of the clip that is timed: a first chunk, and three later chunks


class TimedOp(BoundOp[Op]):
    """A bound op that records its seconds. It computes a later chunk in `portions` portions."""

    def __init__(self, bound: BoundOp[Op], portions: int) -> None:
        super().__init__(bound.number, bound.op, {})
        self._bound = bound
        self._portions = portions
        self.first: list[float] = []
        self._later: list[float] = []

    @property
    def later(self) -> list[float]:
        """The seconds of each later chunk."""
        return [sum(self._later[i : i + self._portions]) for i in range(0, len(self._later), self._portions)]

    def forget(self) -> None:
        """Drop the seconds that were recorded so far."""
        self.first, self._later = [], []

    def room(self, shape: Sequence[int], like: Tensor, *, first: bool, exchange: HaloExchange | None) -> Room:
        return self._bound.room(shape, like, first=first, exchange=exchange)

    def run(self, flow: Flow) -> None:
        started = time.perf_counter()
        self._bound.run(flow)
        (self.first if flow.first else self._later).append(time.perf_counter() - started)


def op_seconds(
    model: AutoencoderKLWan, alone: ProcessGroup, rows: int, cols: int, rounds: int, *, image: bool
) -> list[dict[str, Any]]:
    """One entry for each op: medians over `rounds` decodes of float32 latents of `rows` x `cols`, for the report.

    alone: a group of this rank only. image: the first chunk is that of a clip of one frame, which keeps no
    temporal caches.
    """
    vae = BoundVae(model.config, ModuleWeights(model), dtype=torch.float32, device=torch.device("cpu"))
    program = vae.program("decode")
    ops = {
        number: TimedOp(bound, program.portions_at(number + 1, first=False))
        for number, bound in vae.bind("decode", range(len(program))).items()
    }
    comm = Comm(alone)
    z = torch.randn(1, program.z_dim, CHUNKS, rows, cols, generator=torch.Generator().manual_seed(0))

    def decode(frames: int) -> None:
        block = Block(ops=(0, len(program)), chunks=(0, frames), rank=0)
        lowered = lower(program, LatentShape(1, frames, rows, cols), Assignment.of(1, [block]))
        for _ in Execution(lowered, 0, ops, comm, partial(latent_chunk, z)).results():
            pass

    def timed(frames: int) -> list[tuple[list[float], list[float]]]:
        decode(frames)  # warms up
        for op in ops.values():
            op.forget()
        for _ in range(rounds):
            decode(frames)
        return [(op.first, op.later) for op in ops.values()]

    clip = timed(CHUNKS)
    first = timed(1) if image else clip
    return [
        {"name": op.name, "first_s": statistics.median(a), "later_s": statistics.median(b)}
        for op, (a, _), (_, b) in zip(program.ops, first, clip, strict=True)
    ]
