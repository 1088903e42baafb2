"""Runs any contiguous slice of a program on any slab of the picture, one temporal chunk at a time.

    part = Slice(program, start, stop, weights)     # holds only the weights of its ops
    state = part.state(chunks)                      # what the slice remembers between chunks, explicit
    for ...:
        tensors = part.run(tensors, state, exchange)

`tensors` are what crosses a cut of the program: the activation and the open shortcuts (`Program.carried`),
channels-last [B, T, H, W, C]. The picture itself, before the first op of the encoder and after the last of the
decoder, is [B, 3, T, H, W]. Nothing here knows of ranks: a strategy that cuts the picture gives an `exchange`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cosmos3_pipeline.vae.bound_ops import Flow, bind
from cosmos3_pipeline.vae.frames import Frames, HaloExchange
from cosmos3_pipeline.vae.ops import NO_ROOM
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
        self._ops = [bind(op, weights) for op in program.ops[start:stop]]
        self.weight_bytes = sum(weights[w.name].nbytes for w in program.weights(start, stop))

    def state(self, chunks: int) -> SliceState:
        """A fresh state for a clip of `chunks` chunks."""
        return SliceState(chunks)

    @torch.no_grad()
    def run(self, tensors: list[Tensor], state: SliceState, exchange: HaloExchange | None = None) -> list[Tensor]:
        """Run the slice on the next chunk.

        `tensors` are those that cross the cut before `start`; the list is emptied and its tensors may be
        overwritten, so that each is freed as soon as it has been used. Returns those that cross the cut at `stop`.
        """
        assert state.done < state.chunks, f"the state is for {state.chunks} chunks, all of which have run"
        first, last = state.done == 0, state.done == state.chunks - 1
        flow = Flow(
            at=Frames(tensors.pop(0)),
            shortcuts=tensors.copy(),
            cache=state.cache,
            first=first,
            last=last,
            exchange=exchange,
            room=NO_ROOM,
        )
        tensors.clear()
        for op, following in zip(self._ops, [*self._ops[1:], None], strict=True):
            flow.room = NO_ROOM if following is None else following.room(first=first, exchange=exchange)
            op.run(flow)
        state.done += 1
        return [_contiguous(flow.at), *flow.shortcuts]


def _contiguous(frames: Frames) -> Tensor:
    return frames.buffer if frames.room == NO_ROOM else frames.inner.contiguous()
