"""Runs any contiguous slice of a program on any slab of the picture, one temporal chunk at a time.

    part = Slice(program, start, stop, weights)     # holds only the weights of its ops
    state = part.state(chunks)                      # what the slice remembers between chunks, explicit
    for ...:
        for tensors in part.portions(given, state, exchange):
            ...

`tensors` are what crosses a cut of the program: the activation and what open shortcuts keep (`Program.carried`),
channels-last [B, T, H, W, C]. The late ops of a decoder see a chunk in portions (`Program.portions_at`): that
takes less memory, and the next in line can begin with the first while the second is computed. The picture itself,
before the first op of the encoder and after the last of the decoder, is [B, 3, T, H, W]. Nothing here knows of
ranks: a strategy that cuts the picture gives an `exchange`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cosmos3_pipeline.vae.bound_ops import BoundOp, Flow, bind
from cosmos3_pipeline.vae.frames import Frames, HaloExchange
from cosmos3_pipeline.vae.host_memory import keeping_large_buffers
from cosmos3_pipeline.vae.ops import Op
from cosmos3_pipeline.vae.program import Program


@dataclass
class SliceState:
    """What a slice remembers between the chunks of one clip: `cache` holds frames by the name of their op."""

    chunks: int
    done: int = 0
    cache: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.cache.values())


class Slice:
    """The ops [start, stop) of a program with their weights, ready to run.

    `weights` maps names of `AutoencoderKLWan.state_dict()` to tensors and may hold more than the slice needs.
    """

    def __init__(self, program: Program, start: int, stop: int, weights: Mapping[str, Tensor]) -> None:
        self.program = program
        self.start = start
        self.stop = stop
        self._ops = bind(program.ops[start:stop], weights)
        self.weight_bytes = sum(weights[w.name].nbytes for w in program.weights(start, stop))

    def state(self, chunks: int) -> SliceState:
        """A fresh state for a clip of `chunks` chunks."""
        return SliceState(chunks)

    def run(self, tensors: list[Tensor], state: SliceState, exchange: HaloExchange | None = None) -> list[Tensor]:
        """Run the slice on the next chunk, whole: as `portions`, with its results put together."""
        parts = self.program.portions_at(self.start, first=state.done == 0)
        given = [tensors]
        if parts > 1:
            given = [list(portion) for portion in zip(*(_cut(tensor, parts) for tensor in tensors), strict=True)]
            tensors.clear()
        results = list(self.portions(given, state, exchange))
        if len(results) == 1:
            return results[0]
        picture = self.stop == len(self.program) and self.program.direction == "decode"
        return [torch.cat(portions, dim=2 if picture else 1) for portions in zip(*results, strict=True)]

    def portions(
        self,
        given: Iterable[list[Tensor]],
        state: SliceState,
        exchange: HaloExchange | None = None,
        *,
        run: tuple[int, int] | None = None,
        keeps_passed: bool = False,
    ) -> Iterator[list[Tensor]]:
        """Run the slice on the next chunk, portion by portion.

        `given` are the portions that cross the cut before `start`, each the list of its tensors; the lists are
        emptied, so that each is freed as soon as it has been used, and the tensors may be overwritten, or kept for
        the next chunk. Yields those that cross the cut at `stop`.

        `run` [start, stop): those of its ops that it runs on this chunk, the others being run by other ranks.
        `keeps_passed`: of the input of the op at `stop` is kept what it needs to be run here on a later chunk. For
        what others have kept for it see `keep`.
        """
        assert state.done < state.chunks, f"the state is for {state.chunks} chunks, all of which have run"
        start, stop = run or (self.start, self.stop)
        ops = self._ops[start - self.start : stop - self.start]
        passed = self._ops[stop - self.start] if keeps_passed else None
        first, last = state.done == 0, state.done == state.chunks - 1
        early = max(0, self.program.portions_from - start)
        parts = self.program.portions_at(len(self.program), first=first)
        done = 0
        for tensors in given:
            ends = early >= len(ops)
            passing = passed if ends else None
            whole = self._through(
                start, ops[:early], tensors, state, exchange, first=first, last=last, passed=passing
            )
            if ends:
                yield whole
                continue
            # Where the slice begins before the ops that see portions, no shortcut is open at the first of these.
            given_late = [whole]
            if start <= self.program.portions_from and parts > 1:
                given_late = [[portion] for portion in _cut(whole.pop(), parts)]
            for portion in given_late:
                done += 1
                ended = last and done == parts
                yield self._through(
                    start + early, ops[early:], portion, state, exchange, first=first, last=ended, passed=passed
                )
        state.done += 1

    def kept(self, number: int, state: SliceState) -> Tensor:
        """What op `number` has kept from the chunk before, for a rank that runs it on the next one."""
        return state.cache[self.program.ops[number].name]

    def forget(self, number: int, state: SliceState) -> None:
        """Op `number` is run by another rank from now on."""
        del state.cache[self.program.ops[number].name]

    def keep(self, number: int, state: SliceState, kept: Tensor) -> None:
        """Op `number` has been run by another rank on the chunk before, and `kept` this for the next one."""
        state.cache[self.program.ops[number].name] = kept

    @torch.no_grad()
    def _through(
        self,
        start: int,
        ops: list[BoundOp[Op]],
        tensors: list[Tensor],
        state: SliceState,
        exchange: HaloExchange | None,
        *,
        first: bool,
        last: bool,
        passed: BoundOp[Op] | None = None,
    ) -> list[Tensor]:
        """`tensors` after `ops`, the first of which is op `start`; the list is emptied.

        Another rank runs the one that is `passed` by.
        """
        if not ops:
            return tensors
        flow = Flow(
            at=Frames(tensors.pop(0)),
            shortcuts=[tensors[which] for which in self.program.shortcuts(start)],
            cache=state.cache,
            first=first,
            last=last,
            exchange=exchange,
        )
        tensors.clear()
        with keeping_large_buffers():
            for op, following in zip(ops, [*ops[1:], None], strict=True):
                flow.following = following
                op.run(flow)
            if passed is not None:
                passed.pass_by(flow)
            kept = dict(zip(self.program.shortcuts(start + len(ops)), flow.shortcuts, strict=True))
            return [flow.at.inner.contiguous(), *kept.values()]


def _cut(chunk: Tensor, parts: int) -> list[Tensor]:
    """[B, T, H, W, C] in `parts` equal ones along T, each contiguous."""
    return [portion.contiguous() for portion in chunk.chunk(parts, dim=1)]
