"""A place in a line of stages: a portion arrives while the last is computed, and leaves while the next is."""

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
from cosmos3_pipeline.vae.program import Program
from cosmos3_pipeline.vae.strategy import LatentShape, Turns, ops_on
from cosmos3_pipeline.vae.weights import BoundVae


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

    `above` is None where the input is, `below` where the result is. `turns`: which of the ops of its slice it runs
    in turn with them.
    """

    def __init__(
        self,
        vae: BoundVae,
        comm: Comm,
        part: Part,
        *,
        above: int | None,
        below: int | None,
        turns: Sequence[Turns] = (),
    ) -> None:
        self._vae = vae
        self._comm = comm
        self._slice = part
        self._above = above
        self._below = below
        assert all(part.program.can_take_turns(one.op) for one in turns), (
            "such an op keeps more than its last frames"
        )
        self._turns = turns

    def outputs(self, latent: LatentShape, chunks: int, source: Callable[[int], Tensor]) -> Iterator[Tensor]:
        """Passes every chunk through the slice; yields the results at the end of the line.

        `latent` is the shape, or that of the slab, that comes from above. `source(index)` is the input of a chunk
        at the start of the line, and is not asked elsewhere.
        """
        state = self._slice.state(chunks)
        arrivals = self._arrivals(latent, chunks)
        leaving: Pending | None = None
        for index in range(chunks):
            given = iter([[source(index)]]) if self._above is None else self._given(arrivals, index, state)
            kept = self._handed_over(index, state)
            for results in self._portions(given, index, state):
                if self._below is None:
                    yield results[0]
                    continue
                # One portion may be under way while the next is computed; more would pile up in memory.
                if leaving is not None:
                    leaving.wait()
                leaving = self._comm.exchange(sends=[(tensor, self._below) for tensor in [*results, *kept]])
                kept.clear()
        if leaving is not None:
            leaving.wait()

    def _arrivals(self, latent: LatentShape, chunks: int) -> Iterator[list[Tensor]]:
        """What comes from above, portion by portion. While one is worked on, the next arrives."""
        expected = deque(shapes for index in range(chunks) for shapes in self._expected(latent, index))
        arriving = deque([self._receive(expected.popleft())])
        while arriving:
            buffers, pending = arriving.popleft()
            pending.wait()
            if expected:
                arriving.append(self._receive(expected.popleft()))
            yield buffers

    def _expected(self, latent: LatentShape, index: int) -> Iterator[list[Shape]]:
        """The shapes of what comes from above for a chunk, portion by portion."""
        program, (start, _) = self._slice.program, self._run(index)
        shapes = program.carried_shapes(start, latent, first=index == 0)
        kept = [program.kept_shape(one.op, latent) for one in self._taken_over(index)]
        for _ in range(program.portions_at(start, first=index == 0)):
            yield [*shapes, *(shape for shape in kept if shape)]
            kept.clear()

    def _given(self, arrivals: Iterator[list[Tensor]], index: int, state: Any) -> Iterator[list[Tensor]]:
        """The portions of a chunk that come from above. With the first comes what its ops need besides."""
        program, (start, _) = self._slice.program, self._run(index)
        taken = list(self._taken_over(index))
        for tensors in islice(arrivals, program.portions_at(start, first=index == 0)):
            for one in taken:
                if program.ops[one.op].cached_frames:
                    self._whole.keep(one.op, state, tensors.pop())
            taken.clear()
            yield tensors

    def _handed_over(self, index: int, state: Any) -> list[Tensor]:
        """What the next rank needs, which runs an op on this chunk that this rank has run on the one before."""
        ops = self._slice.program.ops
        ours = [one for one in self._turns if one.op != self._slice.start and one.hands_over(index)]
        return [self._whole.kept(one.op, state) for one in ours if ops[one.op].cached_frames]

    def _taken_over(self, index: int) -> Iterator[Turns]:
        return (one for one in self._turns if one.op == self._slice.start and one.hands_over(index))

    def _run(self, index: int) -> tuple[int, int]:
        """The ops that it runs on a chunk."""
        return ops_on(index, (self._slice.start, self._slice.stop), self._turns)

    def _portions(self, given: Iterable[list[Tensor]], index: int, state: Any) -> Iterator[list[Tensor]]:
        if not self._turns:
            return self._slice.portions(given, state)
        return self._whole.portions(given, state, run=self._run(index))

    @property
    def _whole(self) -> Slice:
        """Its part, of the whole picture, where there are turns."""
        assert isinstance(self._slice, Slice), "slabs are not run in turn"
        return self._slice

    def _receive(self, shapes: Sequence[Shape]) -> tuple[list[Tensor], Pending]:
        """Buffers of `shapes`, into which a portion is arriving."""
        assert self._above is not None
        buffers = [torch.empty(shape, dtype=self._vae.dtype, device=self._vae.device) for shape in shapes]
        above = self._above
        return buffers, self._comm.exchange(receives=[(buffer, above) for buffer in buffers])
