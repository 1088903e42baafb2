"""A place in a line of stages: a portion arrives while the last is computed, and leaves while later ones are."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from cosmos3_pipeline.distributed.comm import Comm, Pending
from cosmos3_pipeline.vae.executor import Slice
from cosmos3_pipeline.vae.ops import Shape
from cosmos3_pipeline.vae.program import Program, portions_under_way
from cosmos3_pipeline.vae.strategy import LatentShape
from cosmos3_pipeline.vae.weights import BoundVae
from cosmos3_plugins.layer_pipeline.passing import Passing


class Part(Protocol):
    """A run of ops with their weights: an executor's `Slice`, or what is used like one."""

    program: Program
    start: int
    stop: int

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

    def outputs(
        self,
        latent: LatentShape,
        chunks: int,
        source: Callable[[int], Tensor],
        runs: Sequence[tuple[int, int]] = (),
    ) -> Iterator[Tensor]:
        """Passes every chunk through the slice; yields the results at the end of the line.

        `latent` is the shape, or that of the slab, that comes from above. `source(index)` is the input of a chunk
        at the start of the line, and is not asked elsewhere. `runs`: the ops [start, stop) that it runs on each
        chunk, if not always all.
        """
        passing = Passing(self._slice.program, latent, runs or [(self._slice.start, self._slice.stop)] * chunks)
        most = portions_under_way(chunks, moving=bool(runs))
        state = self._slice.state(chunks)
        arrivals = self._arrivals(passing)
        leaving: deque[Pending] = deque()
        for index in range(chunks):
            given = (
                iter([[source(index)]]) if self._above is None else self._given(arrivals, passing, index, state)
            )
            kept = self._handed_over(passing, index, state)
            for results in self._portions(given, passing, index, state):
                if self._below is None:
                    yield results[0]
                    continue
                # More would pile up in memory.
                if len(leaving) == most:
                    leaving.popleft().wait()
                leaving.append(self._comm.exchange(sends=[(tensor, self._below) for tensor in [*results, *kept]]))
                kept.clear()
        for each in leaving:
            each.wait()

    def _arrivals(self, passing: Passing) -> Iterator[list[Tensor]]:
        """What comes from above, portion by portion. While one is worked on, the next arrives."""
        expected = deque(shapes for index in range(len(passing.runs)) for shapes in passing.expected(index))
        arriving = deque([self._receive(expected.popleft())])
        while arriving:
            buffers, pending = arriving.popleft()
            pending.wait()
            if expected:
                arriving.append(self._receive(expected.popleft()))
            yield buffers

    def _given(
        self, arrivals: Iterator[list[Tensor]], passing: Passing, index: int, state: Any
    ) -> Iterator[list[Tensor]]:
        """The portions of a chunk that come from above. With the first comes what its ops need besides."""
        for op in passing.handed_back(index):
            self._whole.forget(op, state)
        taken = passing.taken_over(index)
        for tensors in islice(arrivals, passing.portions(index)):
            while taken:
                self._whole.keep(taken.pop(), state, tensors.pop())
            yield tensors

    def _handed_over(self, passing: Passing, index: int, state: Any) -> list[Tensor]:
        """What the rank below needs for ops that this rank has run on the chunk before."""
        kept = []
        for op in passing.handed_over(index):
            kept.append(self._whole.kept(op, state))
            if op != passing.runs[index][1] or not passing.keeps_passed(index):
                self._whole.forget(op, state)
        return kept

    def _portions(
        self, given: Iterable[list[Tensor]], passing: Passing, index: int, state: Any
    ) -> Iterator[list[Tensor]]:
        run = passing.runs[index]
        if not isinstance(self._slice, Slice):
            assert run == (self._slice.start, self._slice.stop)
            return self._slice.portions(given, state)
        return self._slice.portions(given, state, run=run, keeps_passed=passing.keeps_passed(index))

    @property
    def _whole(self) -> Slice:
        """Its part, of the whole picture, where cuts move."""
        assert isinstance(self._slice, Slice), "the cuts of slabs do not move"
        return self._slice

    def _receive(self, shapes: Sequence[Shape]) -> tuple[list[Tensor], Pending]:
        """Buffers of `shapes`, into which a portion is arriving."""
        assert self._above is not None
        buffers = [torch.empty(shape, dtype=self._vae.dtype, device=self._vae.device) for shape in shapes]
        above = self._above
        return buffers, self._comm.exchange(receives=[(buffer, above) for buffer in buffers])
