"""One rank's slab of every chunk, through the whole program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.vae.pixels import as_pixels, latent_chunk, picture_chunk, picture_chunks
from cosmos3_pipeline.vae.strategy import Direction, Pixels
from cosmos3_pipeline.vae.weights import BoundVae
from cosmos3_plugins.spatial_shard.exchange import Collector, SlabRun, slab_of
from cosmos3_plugins.spatial_shard.slabs import Grid, run_of, stretches_of

# Where the rows are, with the columns next to them.
PICTURE_ROWS = 3  # of a latent or a float picture [B, C, T, H, W]
PIXEL_ROWS = 2  # of bytes and of the executor's activations [B, T, H, W, C]


class ShardRunner:
    """All ops on one slab. `grid_of` gives the cuts of the latent for its rows and columns."""

    def __init__(
        self, vae: BoundVae, comm: Comm, direction: Direction, grid_of: Callable[[int, int], Grid]
    ) -> None:
        self._comm = comm
        self._program = program = vae.program(direction)
        slices = [vae.slice(direction, start, stop) for start, stop, _ in stretches_of(program)]

        def slab_run(rows: int, cols: int) -> SlabRun:
            return SlabRun(comm, slices, run_of(program, grid_of(rows, cols)))

        # Remembered: to find a small picture's slabs and halos takes as long as several ops on them.
        self._slab_run = lru_cache(slab_run)

    def stream(self, z: Tensor, *, pixels: Pixels) -> Iterator[Tensor]:
        """Yields each portion of the picture on the root; the other ranks send theirs and yield nothing."""
        part = self._slab_run(z.shape[3], z.shape[4])
        z = slab_of(z, part.run.entering.slab(self._comm.rank), 1, PICTURE_ROWS)
        pictures = self._outputs(part, z.shape[2], lambda index: latent_chunk(z, index))
        parts = (as_pixels(picture, pixels) for picture in pictures)
        dim = PIXEL_ROWS if pixels == "uint8" else PICTURE_ROWS
        yield from Collector(self._comm, part.run.leaving).collected(parts, dim=dim)

    def encode(self, x: Tensor) -> Tensor:
        """[B, 3, F, H, W] -> moments [B, 2 * z_dim, T, h, w], put together on the root and broadcast."""
        program = self._program
        scale, chunks = program.spatial, picture_chunks(x.shape[2])
        rows, cols = x.shape[3] // scale, x.shape[4] // scale
        part = self._slab_run(rows, cols)
        own = slab_of(x, part.run.entering.slab(self._comm.rank), scale, PICTURE_ROWS)
        moments = torch.cat(list(self._outputs(part, chunks, lambda index: picture_chunk(own, index))), dim=1)
        frames = 1 + (chunks - 1) * program.latents_per_chunk
        wholes = list(Collector(self._comm, part.run.leaving).collected([moments], dim=PIXEL_ROWS))
        whole = wholes[0] if wholes else x.new_empty(x.shape[0], frames, rows, cols, 2 * program.z_dim)
        self._comm.broadcast(whole)
        return whole.permute(0, 4, 1, 2, 3).contiguous()

    @staticmethod
    def _outputs(part: SlabRun, chunks: int, source: Callable[[int], Tensor]) -> Iterator[Tensor]:
        state = part.state(chunks)
        for index in range(chunks):
            for (result,) in part.portions([[source(index)]], state):
                yield result
