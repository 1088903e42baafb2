"""A place in a line of stages: a chunk arrives while the one before is computed, and leaves while the next is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cosmos3_pipeline.distributed.comm import Comm, Pending
from cosmos3_pipeline.vae.executor import Slice
from cosmos3_pipeline.vae.frames import HaloExchange
from cosmos3_pipeline.vae.strategy import LatentShape
from cosmos3_pipeline.vae.weights import BoundVae


class Place:
    """One rank's slice, between rank `above`, which has the ops before it, and rank `below`, with those after it.

    `above` is None where the input is, `below` where the result is.
    """

    def __init__(self, vae: BoundVae, comm: Comm, part: Slice, *, above: int | None, below: int | None) -> None:
        self._vae = vae
        self._comm = comm
        self._slice = part
        self._above = above
        self._below = below

    def outputs(
        self,
        latent: LatentShape,
        chunks: int,
        source: Callable[[int], Tensor],
        exchange: HaloExchange | None = None,
    ) -> Iterator[Tensor]:
        """Passes every chunk of `latent` through the slice; yields the results at the end of the line.

        `source(index)` is the input of a chunk at the start of the line, and is not asked elsewhere.
        """
        state = self._slice.state(chunks)
        arriving = self._receive(latent, 0)
        leaving: Pending | None = None
        for index in range(chunks):
            if arriving is None:
                tensors = [source(index)]
            else:
                tensors, pending = arriving
                pending.wait()
                arriving = self._receive(latent, index + 1) if index + 1 < chunks else None
            results = self._slice.run(tensors, state, exchange)
            if self._below is None:
                yield results[0]
                continue
            # One chunk may be under way while the next is computed; more would pile up in memory.
            if leaving is not None:
                leaving.wait()
            leaving = self._comm.exchange(sends=[(tensor, self._below) for tensor in results])
        if leaving is not None:
            leaving.wait()

    def _receive(self, latent: LatentShape, index: int) -> tuple[list[Tensor], Pending] | None:
        """Buffers into which chunk `index` is arriving; None at the start of the line, where the input is."""
        if self._above is None:
            return None
        shapes = self._slice.program.carried_shapes(self._slice.start, latent, first=index == 0)
        buffers = [torch.empty(shape, dtype=self._vae.dtype, device=self._vae.device) for shape in shapes]
        above = self._above
        return buffers, self._comm.exchange(receives=[(buffer, above) for buffer in buffers])
