"""A clip that is made chunk after chunk: encode, denoise and decode take turns.

The frames of one chunk are written while the next chunk is made. The next chunk begins with the last frames of
this one. These frames are sent to every rank, because every rank takes part in encoding them.
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
        """Leave the condition of chunk `number` in the state. The chunk begins with the frames `seed`.

        `seed` is None for the first chunk. `Chunks.passed` says which form it has. "float" is [frames, 3, H, W] in
        the VAE's dtype, clamped to [-1, 1] by its decoder; "uint8" is bytes [frames, H, W, 3].
        """

    def denoise(self, context: RunContext, number: int) -> None:
        """Leave the latents of chunk `number`, [1, C, T, h, w], in the state."""


class ChunkedStage(ABC):
    """Leaves `context.frames`, an iterator of uint8 frames [frames, H, W, 3]. Reading the iterator does all work.

    Every rank must read its iterator to the end, because all ranks share the work; only the root gets frames. With
    `keep_latents` the latents of all chunks are in the state afterwards, as [chunks, C, T, h, w].
    """

    def __init__(self, chunks: Chunks, *, keep_latents: bool) -> None:
        self._chunks = chunks
        self._keep_latents = keep_latents

    def __call__(self, context: RunContext) -> None:
        context.frames = self._frames(context)

    @abstractmethod
    def begin(self, context: RunContext, stack: ExitStack) -> ChunkMaker:
        """Prepare what all chunks share. Contexts that are entered in `stack` are exited after the last chunk."""

    def first_chunk(self, context: RunContext, *, denoise: bool = True) -> None:
        """Leave the first chunk's condition and latents [1, C, T, h, w] in the state. Decodes nothing."""
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
        """Yield the new frames of the chunk. Returns, on every rank, the first frames of the next chunk."""
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
        """An empty tensor for the frames with which the next chunk begins."""
        clip, frames, device = context.clip, self._chunks.overlap, context.components.device
        if self._chunks.passed == "uint8":
            return torch.empty(frames, clip.height, clip.width, 3, dtype=torch.uint8, device=device)
        return torch.empty(frames, 3, clip.height, clip.width, dtype=dtype, device=device)


def of_chunks(number: int, chunks: Chunks) -> str:
    """Words for the title of a progress bar: which chunk is made."""
    return f", chunk {number + 1} of {chunks.count}" if chunks.count > 1 else ""
