"""One rank's stage of the line, and what becomes of its results."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.vae.pixels import as_pixels, latent_chunk, picture_chunk, picture_chunks
from cosmos3_pipeline.vae.strategy import Direction, LatentShape, Pixels, StrategyError
from cosmos3_pipeline.vae.weights import BoundVae
from cosmos3_plugins.layer_pipeline import LayerPipeline
from cosmos3_plugins.layer_pipeline.balance import Run
from cosmos3_plugins.layer_pipeline.line import Place
from cosmos3_plugins.layer_pipeline.measured import op_seconds


class Stage:
    """The ops of one rank. Chunks come from the rank above and go to the rank below; the root is at the end."""

    def __init__(self, vae: BoundVae, comm: Comm, direction: Direction, strategy: LayerPipeline) -> None:
        self._vae = vae
        self._comm = comm
        self._direction: Direction = direction
        self._strategy = strategy
        self._program = vae.program(direction)
        self._bound: tuple[tuple[int, int], Place] | None = None
        if strategy.op_seconds:
            self._check_agreement(op_seconds(strategy.op_seconds).digest)
        if not strategy.depends_on_clip:
            self._place(self._run(self._latent(1, 1, 1, 1)).ops)

    def _check_agreement(self, digest: str) -> None:
        """Raise StrategyError unless every rank has read the same seconds of ops.

        By others its run would be another, and ranks would wait for what nobody sends.
        """
        others = [rank for rank, other in enumerate(self._comm.agree(digest)) if other != digest]
        if others:
            raise StrategyError(
                f"layer_pipeline.op_seconds={self._strategy.op_seconds!r} is another file on ranks {others} than "
                f"on rank {self._comm.rank}; all have to divide the ops alike; copy one to every machine"
            )

    def _latent(self, batch: int, frames: int, rows: int, cols: int) -> LatentShape:
        return LatentShape(batch, frames, rows, cols, self._vae.dtype.itemsize)

    def _run(self, latent: LatentShape) -> Run:
        """What this rank runs of a clip of `latent`."""
        return self._strategy.runs(self._program, latent, self._comm.size)[self._comm.rank]

    def _place(self, ops: tuple[int, int]) -> Place:
        """This rank's place in the line with the run `ops`, which are bound unless they are already."""
        comm = self._comm
        if self._bound is None or self._bound[0] != ops:
            self._bound = None  # its weights go before others come
            place = Place(
                self._vae,
                comm,
                self._vae.slice(self._direction, *ops),
                above=comm.rank + 1 if comm.rank + 1 < comm.size else None,
                below=comm.rank - 1 if comm.rank > 0 else None,
            )
            self._bound = ops, place
        return self._bound[1]

    def _outputs(self, latent: LatentShape, chunks: int, source: Callable[[int], Tensor]) -> Iterator[Tensor]:
        run = self._run(latent)
        return self._place(run.ops).outputs(latent, chunks, source, run.runs)

    def stream(self, z: Tensor, *, pixels: Pixels) -> Iterator[Tensor]:
        """Yields the picture on the root; the other ranks send what they compute and yield nothing."""
        latent = self._latent(z.shape[0], z.shape[2], z.shape[3], z.shape[4])
        for picture in self._outputs(latent, z.shape[2], lambda index: latent_chunk(z, index)):
            yield as_pixels(picture, pixels)

    def encode(self, x: Tensor) -> Tensor:
        """[B, 3, F, H, W] -> moments [B, 2 * z_dim, T, h, w], computed by the root and broadcast."""
        chunks, scale = picture_chunks(x.shape[2]), self._program.spatial
        frames = 1 + (chunks - 1) * self._program.latents_per_chunk
        latent = self._latent(x.shape[0], frames, x.shape[3] // scale, x.shape[4] // scale)
        parts = list(self._outputs(latent, chunks, lambda index: picture_chunk(x, index)))
        shape = (latent.batch, 2 * self._program.z_dim, frames, latent.rows, latent.cols)
        if self._comm.is_root:
            moments = torch.cat(parts, dim=1).permute(0, 4, 1, 2, 3).contiguous()
        else:
            moments = x.new_empty(shape)
        self._comm.broadcast(moments)
        return moments
