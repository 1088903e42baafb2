"""Runs a strategy on one rank: makes the assignment of a clip, binds the rank's weights, executes its actions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

import torch
from torch import Tensor

from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.vae.bound_ops import BoundOp
from cosmos3_pipeline.vae.execute import Execution
from cosmos3_pipeline.vae.inputs import latent_shape
from cosmos3_pipeline.vae.lowering import Lowered, lower
from cosmos3_pipeline.vae.ops import LatentShape, Op
from cosmos3_pipeline.vae.pixels import Pixels, latent_chunk, picture_chunk
from cosmos3_pipeline.vae.planning import check, named
from cosmos3_pipeline.vae.program import Direction
from cosmos3_pipeline.vae.strategy import Strategy
from cosmos3_pipeline.vae.weights import BoundVae

# The lowered actions are cached for this many shapes of clips.
_SHAPES = 8


class AssignedRunner:
    """Runs what `strategy` assigns to this rank. Holds the weights of the last clip's ops."""

    def __init__(self, vae: BoundVae, comm: Comm, direction: Direction, strategy: Strategy) -> None:
        self._vae = vae
        self._comm = comm
        self._direction: Direction = direction
        self._strategy = strategy
        self._ops: dict[int, BoundOp[Op]] = {}
        self.lowered = lru_cache(_SHAPES)(self._lowered)

    def _lowered(self, shape: LatentShape) -> Lowered:
        """The actions of all ranks for a clip of `shape`. Raises StrategyError."""
        program = self._vae.program(self._direction)
        assignment = self._strategy.assign(program, shape, self._comm.size)
        with named(self._strategy):
            lowered = lower(program, shape, assignment)
        check(self._strategy, lowered)
        return lowered

    def bind(self, shape: LatentShape) -> Lowered:
        """Load the weights that this rank needs for a clip of `shape`, drop all others, and return the actions.

        It also makes the connections for the rank's messages, so all ranks must call it together.
        """
        lowered = self.lowered(shape)
        needed = lowered.ops(self._comm.rank)
        for op in set(self._ops) - set(needed):
            del self._ops[op]  # frees weights before others are loaded
        missing = [op for op in needed if op not in self._ops]
        if missing:  # `bind` lists all weights of the model, which takes as long as several small ops
            self._ops |= self._vae.bind(self._direction, missing)
        self._comm.connect_pairs(lowered.pairs)
        return lowered

    def stream(self, z: Tensor, *, pixels: Pixels) -> Iterator[Tensor]:
        """Yields the picture in order, on the root; on every rank if each rank computes the whole picture."""
        lowered, rank = self.bind(latent_shape(self._vae.program("decode"), z)), self._comm.rank
        execution = Execution(lowered, rank, self._ops, self._comm, partial(latent_chunk, z), pixels=pixels)
        yield from execution.results()

    def encode(self, x: Tensor) -> Tensor:
        """[B, 3, F, H, W] -> moments [B, 2 * z_dim, T, h, w]."""
        program = self._vae.program("encode")
        lowered, rank = self.bind(latent_shape(program, x)), self._comm.rank
        source = partial(picture_chunk, x)
        execution = Execution(lowered, rank, self._ops, self._comm, source)
        parts = list(execution.results())
        shape = lowered.shape
        if parts:
            moments = torch.cat(parts, dim=1)
        else:
            moments = x.new_empty(shape.batch, shape.frames, shape.rows, shape.cols, 2 * program.z_dim)
        if not lowered.everywhere:
            self._comm.broadcast(moments)
        return moments.permute(0, 4, 1, 2, 3).contiguous()
