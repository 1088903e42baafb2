"""A clip that is made chunk after chunk: encode, denoise and decode take turns.

Frames of one chunk leave while the next is made. Those with which the next one begins go to every rank, because
every rank takes part in encoding them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from typing import Protocol

import torch
from torch import Tensor

from cosmos3_pipeline.distributed.mesh import REPLICA
from cosmos3_pipeline.planning.chunks import Chunks
from cosmos3_pipeline.stages.context import RunContext
from cosmos3_pipeline.stages.decode import vae_latents
from cosmos3_pipeline.vae.pixels import Pixels, to_uint8


class ChunkMaker(Protocol):
    """Makes the latents of one chunk after the other."""

    def encode(self, context: RunContext, number: int, seed: Tensor | None) -> None:
        """Leave what conditions chunk `number` in the state. It begins with `seed`, None for the first chunk.

        `seed` are frames as `Chunks.passed` says: [frames, 3, H, W] in [-1, 1] in the VAE's dtype, where its
        decoder clamps them, or bytes [frames, H, W, 3].
        """

    def denoise(self, context: RunContext, number: int) -> None:
        """Leave the latents of chunk `number`, [1, C, T, h, w], in the state."""


class ChunkedStage(ABC):
    """Leaves `context.frames`, an iterator of uint8 frames [frames, H, W, 3]; all work happens as it is read.

    Every rank must read its own to the end: those that are not the root take part and get nothing. With
    `keep_latents` those of all chunks are in the state then, as [chunks, C, T, h, w].
    """

    def __init__(self, chunks: Chunks, *, keep_latents: bool) -> None:
        self._chunks = chunks
        self._keep_latents = keep_latents

    def __call__(self, context: RunContext) -> None:
        context.frames = self._frames(context)

    @abstractmethod
    def begin(self, context: RunContext, stack: ExitStack) -> ChunkMaker:
        """Prepare what all chunks share; what is entered in `stack` is left after the last one."""

    def first_chunk(self, context: RunContext, *, denoise: bool = True) -> None:
        """Leave in the state what conditions the first chunk, and its latents [1, C, T, h, w]; decodes nothing."""
        with ExitStack() as stack:
            maker = self.begin(context, stack)
            maker.encode(context, 0, None)
            if denoise:
                maker.denoise(context, 0)

    def _frames(self, context: RunContext) -> Iterator[Tensor]:
        seed, kept = None, []
        with ExitStack() as stack:
            maker = self.begin(context, stack)
            for number in range(self._chunks.count):
                maker.encode(context, number, seed)
                maker.denoise(context, number)
                if self._keep_latents:
                    kept.append(context.state.get("latents").cpu())
                seed = yield from self._decode(context, number)
        if kept:
            context.state.set("latents", torch.cat(kept))

    def _decode(self, context: RunContext, number: int) -> Generator[Tensor, None, Tensor | None]:
        """Yield the new frames of the chunk; returns those with which the next one begins, on every rank."""
        chunks = self._chunks
        new, seeds = chunks.written(number), number + 1 < chunks.count and chunks.overlap > 0
        pixels: Pixels = chunks.passed if seeds else "uint8"
        with context.measure("decode"):
            vae = context.components.vae(encoder=True)
            stream = iter(vae.decode_stream(vae_latents(context), pixels=pixels))
            seed = self._room(context, vae.dtype) if seeds else None
        at = 0
        title = f"decoded frames{of_chunks(number, chunks)}"
        with context.reporter.track(title, context.clip.num_frames) as advance:
            while True:
                with context.measure("decode", portion=True), torch.no_grad():
                    portion = next(stream, None)
                    if portion is None:
                        break
                    if seed is not None:
                        frames = portion.transpose(0, 1) if pixels == "float" else portion
                        begin = max(chunks.stride - at, 0)
                        if begin < len(frames):
                            first = at + begin - chunks.stride
                            seed[first : first + len(frames) - begin] = frames[begin:]
                    if pixels == "float":
                        portion = to_uint8(portion[None])[0]
                    start, stop = max(new.start - at, 0), min(new.stop - at, len(portion))
                    at += len(portion)
                advance(len(portion))
                if start < stop:
                    yield portion[start:stop]
        if seed is not None:
            with context.measure("decode"):
                context.mesh.comm(REPLICA).broadcast(seed)
        return seed

    def _room(self, context: RunContext, dtype: torch.dtype) -> Tensor:
        """Room for the frames with which the next chunk begins."""
        clip, frames, device = context.clip, self._chunks.overlap, context.components.device
        if self._chunks.passed == "uint8":
            return torch.empty(frames, clip.height, clip.width, 3, dtype=torch.uint8, device=device)
        return torch.empty(frames, 3, clip.height, clip.width, dtype=dtype, device=device)


def of_chunks(number: int, chunks: Chunks) -> str:
    """Which chunk is worked on, for a person."""
    return f", chunk {number + 1} of {chunks.count}" if chunks.count > 1 else ""
