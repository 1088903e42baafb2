"""One rank's stage: receives a chunk while it computes the one before, and sends on while it computes the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cosmos3_pipeline.distributed.comm import Comm, Pending
from cosmos3_pipeline.vae.pixels import as_pixels, latent_chunk, picture_chunk, picture_chunks
from cosmos3_pipeline.vae.strategy import Direction, LatentShape, Pixels
from cosmos3_pipeline.vae.weights import BoundVae


class Stage:
    """The ops of one rank. Chunks come from the rank above and go to the rank below; the root is at the end."""

    def __init__(self, vae: BoundVae, comm: Comm, direction: Direction, run: tuple[int, int]) -> None:
        self._comm = comm
        self._vae = vae
        self._program = vae.program(direction)
        self._slice = vae.slice(direction, *run)
        self._above = comm.rank + 1 if comm.rank + 1 < comm.size else None
        self._below = comm.rank - 1 if comm.rank > 0 else None

    def stream(self, z: Tensor, *, pixels: Pixels) -> Iterator[Tensor]:
        """Yields the picture on the root; the other ranks send what they compute and yield nothing."""
        latent = LatentShape(z.shape[0], z.shape[2], z.shape[3], z.shape[4])
        for picture in self._outputs(latent, z.shape[2], lambda index: latent_chunk(z, index)):
            yield as_pixels(picture, pixels)

    def encode(self, x: Tensor) -> Tensor:
        """[B, 3, F, H, W] -> moments [B, 2 * z_dim, T, h, w], computed by the root and broadcast."""
        chunks, scale = picture_chunks(x.shape[2]), self._program.spatial
        frames = 1 + (chunks - 1) * self._program.latents_per_chunk
        latent = LatentShape(x.shape[0], frames, x.shape[3] // scale, x.shape[4] // scale)
        parts = list(self._outputs(latent, chunks, lambda index: picture_chunk(x, index)))
        shape = (latent.batch, 2 * self._program.z_dim, frames, latent.rows, latent.cols)
        if self._below is None:
            moments = torch.cat(parts, dim=1).permute(0, 4, 1, 2, 3).contiguous()
        else:
            moments = x.new_empty(shape)
        self._comm.broadcast(moments)
        return moments

    def _outputs(self, latent: LatentShape, chunks: int, source: Callable[[int], Tensor]) -> Iterator[Tensor]:
        """Passes every chunk through this stage; yields the results if it is the last one."""
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
            results = self._slice.run(tensors, state)
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
        """Buffers into which chunk `index` is arriving; None on the first stage, which has the input."""
        if self._above is None:
            return None
        shapes = self._program.carried_shapes(self._slice.start, latent, first=index == 0)
        buffers = [torch.empty(shape, dtype=self._vae.dtype, device=self._vae.device) for shape in shapes]
        above = self._above
        return buffers, self._comm.exchange(receives=[(buffer, above) for buffer in buffers])
