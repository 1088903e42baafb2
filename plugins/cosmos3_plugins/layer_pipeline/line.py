"""A place in a line of stages: a portion arrives while the last is computed, and leaves while the next is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from cosmos3_pipeline.distributed.comm import Comm, Pending
from cosmos3_pipeline.vae.ops import Shape
from cosmos3_pipeline.vae.program import Program
from cosmos3_pipeline.vae.strategy import LatentShape
from cosmos3_pipeline.vae.weights import BoundVae


class Part(Protocol):
    """A run of ops with their weights: an executor's `Slice`, or what is used like one."""

    program: Program
    start: int

    def state(self, chunks: int) -> Any:
        """What it remembers between the chunks of one clip."""
        ...

    def portions(self, given: Iterable[list[Tensor]], state: Any) -> Iterator[list[Tensor]]:
        """As `Slice.portions`."""
        ...


class Place:
    """One rank's slice, between rank `above`, which has the ops before it, and rank `below`, with those after it.

    `above` is None where the input is, `below` where the result is.
    """

    def __init__(self, vae: BoundVae, comm: Comm, part: Part, *, above: int | None, below: int | None) -> None:
        self._vae = vae
        self._comm = comm
        self._slice = part
        self._above = above
        self._below = below

    def outputs(self, latent: LatentShape, chunks: int, source: Callable[[int], Tensor]) -> Iterator[Tensor]:
        """Passes every chunk through the slice; yields the results at the end of the line.

        `latent` is the shape, or that of the slab, that comes from above. `source(index)` is the input of a chunk
        at the start of the line, and is not asked elsewhere.
        """
        state = self._slice.state(chunks)
        arrivals = self._arrivals(latent, chunks)
        leaving: Pending | None = None
        for index in range(chunks):
            parts = self._slice.program.portions_at(self._slice.start, first=index == 0)
            given = [[source(index)]] if self._above is None else islice(arrivals, parts)
            for results in self._slice.portions(given, state):
                if self._below is None:
                    yield results[0]
                    continue
                # One portion may be under way while the next is computed; more would pile up in memory.
                if leaving is not None:
                    leaving.wait()
                leaving = self._comm.exchange(sends=[(tensor, self._below) for tensor in results])
        if leaving is not None:
            leaving.wait()

    def _arrivals(self, latent: LatentShape, chunks: int) -> Iterator[list[Tensor]]:
        """What comes from above, portion by portion. While one is worked on, the next arrives."""
        start, program = self._slice.start, self._slice.program
        expected = deque(
            program.carried_shapes(start, latent, first=index == 0)
            for index in range(chunks)
            for _ in range(program.portions_at(start, first=index == 0))
        )
        arriving = deque([self._receive(expected.popleft())])
        while arriving:
            buffers, pending = arriving.popleft()
            pending.wait()
            if expected:
                arriving.append(self._receive(expected.popleft()))
            yield buffers

    def _receive(self, shapes: Sequence[Shape]) -> tuple[list[Tensor], Pending]:
        """Buffers of `shapes`, into which a portion is arriving."""
        assert self._above is not None
        buffers = [torch.empty(shape, dtype=self._vae.dtype, device=self._vae.device) for shape in shapes]
        above = self._above
        return buffers, self._comm.exchange(receives=[(buffer, above) for buffer in buffers])
