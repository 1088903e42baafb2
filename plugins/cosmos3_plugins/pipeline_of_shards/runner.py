"""One rank's band of rows in one stage of the line."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.vae.pixels import as_pixels, latent_chunk, picture_chunk, picture_chunks
from cosmos3_pipeline.vae.strategy import Direction, LatentShape, Pixels
from cosmos3_pipeline.vae.weights import BoundVae
from cosmos3_plugins.layer_pipeline.line import Place
from cosmos3_plugins.spatial_shard.exchange import Collector, SlabRun, slab_of
from cosmos3_plugins.spatial_shard.runner import PICTURE_ROWS, PIXEL_ROWS
from cosmos3_plugins.spatial_shard.slabs import Grid, Run, run_of, stretches_of


class ShardStage:
    """The ops of one group on one band. Bands come from the rank above and go to the rank below.

    Rank = group x shards + band; group 0 has the last ops, so its ranks have the result.
    """

    def __init__(
        self, vae: BoundVae, comm: Comm, direction: Direction, run: tuple[int, int], *, groups: int
    ) -> None:
        self._vae = vae
        self._comm = comm
        self._program = vae.program(direction)
        self._ops = run
        self._slices = [vae.slice(direction, a, b) for a, b, _ in stretches_of(self._program, *run)]
        self._groups = groups
        self._shards = comm.size // groups
        self._group, self._band = divmod(comm.rank, self._shards)

    def stream(self, z: Tensor, *, pixels: Pixels) -> Iterator[Tensor]:
        """Yields the picture on the root; the other ranks send what they compute and yield nothing."""
        latent = LatentShape(z.shape[0], z.shape[2], z.shape[3], z.shape[4])
        run = self._run(latent)

        def source(index: int) -> Tensor:
            return latent_chunk(slab_of(z, run.entering.slab(self._band), 1, PICTURE_ROWS), index)

        pictures = self._outputs(run, latent, z.shape[2], source)
        parts = (as_pixels(picture, pixels) for picture in pictures)
        dim = PIXEL_ROWS if pixels == "uint8" else PICTURE_ROWS
        yield from Collector(self._comm, run.leaving).collected(parts, dim=dim)

    def encode(self, x: Tensor) -> Tensor:
        """[B, 3, F, H, W] -> moments [B, 2 * z_dim, T, h, w], put together on the root and broadcast."""
        chunks, scale = picture_chunks(x.shape[2]), self._program.spatial
        frames = 1 + (chunks - 1) * self._program.latents_per_chunk
        latent = LatentShape(x.shape[0], frames, x.shape[3] // scale, x.shape[4] // scale)
        run = self._run(latent)

        def source(index: int) -> Tensor:
            return picture_chunk(slab_of(x, run.entering.slab(self._band), scale, PICTURE_ROWS), index)

        parts = list(self._outputs(run, latent, chunks, source))
        part = [torch.cat(parts, dim=1)] if parts else []
        wholes = list(Collector(self._comm, run.leaving).collected(part, dim=PIXEL_ROWS))
        shape = (latent.batch, frames, latent.rows, latent.cols, 2 * self._program.z_dim)
        whole = wholes[0] if wholes else x.new_empty(shape)
        self._comm.broadcast(whole)
        return whole.permute(0, 4, 1, 2, 3).contiguous()

    def _run(self, latent: LatentShape) -> Run:
        return run_of(self._program, Grid.of(latent.rows, latent.cols, self._shards, 1), *self._ops)

    def _outputs(
        self, run: Run, latent: LatentShape, chunks: int, source: Callable[[int], Tensor]
    ) -> Iterator[Tensor]:
        """Passes this rank's band of every chunk through its stage; yields the results in the last group."""
        rank, shards = self._comm.rank, self._shards
        place = Place(
            self._vae,
            self._comm,
            SlabRun(self._comm, self._slices, run, base=self._group * shards),
            above=rank + shards if self._group + 1 < self._groups else None,
            below=rank - shards if self._group else None,
        )
        return place.outputs(run.entering.slab(self._band).latent(latent), chunks, source)
