"""One rank's tiles; the root puts them together."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from cosmos3_pipeline.distributed.comm import Comm, Pending
from cosmos3_pipeline.vae.executor import SliceState
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.pixels import as_pixels, latent_chunk, picture_chunk, picture_chunks
from cosmos3_pipeline.vae.strategy import Direction, Pixels
from cosmos3_pipeline.vae.weights import BoundVae
from cosmos3_plugins.tiled import Tiled
from cosmos3_plugins.tiled.blend import blend
from cosmos3_plugins.tiled.tiles import Tiling, tiled_ops


class TiledRunner:
    """All ops on the tiles that are dealt to this rank."""

    def __init__(self, vae: BoundVae, comm: Comm, direction: Direction, strategy: Tiled) -> None:
        self._vae = vae
        self._comm = comm
        self._program = vae.program(direction)
        self._tiling = partial(strategy.tiling, self._program)
        stop = tiled_ops(self._program)
        self._slice = vae.slice(direction, 0, stop)
        self._target = self._program.ops[stop - 1].target
        # Has no weights, so every rank may hold it; only the root, which has the whole picture, runs it.
        self._pixels = vae.slice(direction, stop)

    def stream(self, z: Tensor, *, pixels: Pixels) -> Iterator[Tensor]:
        """Yields each chunk of the blended picture on the root; the other ranks send tiles and yield nothing."""
        chunks = z.shape[2]
        latent = LatentShape(z.shape[0], chunks, z.shape[3], z.shape[4])
        tiling = self._tiling(latent)
        dealt = tiling.dealt(self._comm.size)
        states = {tile: self._slice.state(chunks) for tile in dealt[self._comm.rank]}
        whole_state = self._pixels.state(chunks)
        leaving: list[Pending] = []
        for index in range(chunks):
            frame = latent_chunk(z, index)
            if not self._comm.is_root:
                # One chunk may be under way while the next is computed; more would pile up in memory.
                before, leaving = leaving, []
                for tile, state in states.items():
                    leaving.append(self._send(self._run(frame, tiling, tile, state)))
                for pending in before:
                    pending.wait()
                continue
            tiles, arriving = self._receive(tiling, dealt, latent, first=index == 0)
            for tile, state in states.items():
                tiles[tile] = self._run(frame, tiling, tile, state)
            arriving.wait()
            (picture,) = self._pixels.run([blend(_in_order(tiles), tiling, self._target.scale)], whole_state)
            del tiles
            yield as_pixels(picture, pixels)
        for pending in leaving:
            pending.wait()

    def encode(self, x: Tensor) -> Tensor:
        """[B, 3, F, H, W] -> moments [B, 2 * z_dim, T, h, w], blended on the root and broadcast."""
        scale, chunks = self._program.spatial, picture_chunks(x.shape[2])
        frames = 1 + (chunks - 1) * self._program.latents_per_chunk
        latent = LatentShape(x.shape[0], frames, x.shape[3] // scale, x.shape[4] // scale)
        tiling = self._tiling(latent)
        dealt = tiling.dealt(self._comm.size)
        done = {}
        # A tile after the other, so that the frames of one only are kept.
        for tile in dealt[self._comm.rank]:
            (top, bottom), (left, right) = tiling.spans(tile)
            own = x[:, :, :, top * scale : bottom * scale, left * scale : right * scale]
            state = self._slice.state(chunks)
            parts = [self._slice.run([picture_chunk(own, index)], state)[0] for index in range(chunks)]
            done[tile] = torch.cat(parts, dim=1)
        if self._comm.is_root:
            tiles, arriving = self._receive(tiling, dealt, latent, first=None)
            arriving.wait()
            whole = blend(_in_order(tiles | done), tiling, 1)
        else:
            for pending in [self._send(tile) for tile in done.values()]:
                pending.wait()
            whole = x.new_empty(latent.batch, frames, latent.rows, latent.cols, 2 * self._program.z_dim)
        self._comm.broadcast(whole)
        return whole.permute(0, 4, 1, 2, 3).contiguous()

    def _run(self, frame: Tensor, tiling: Tiling, tile: int, state: SliceState) -> Tensor:
        """One chunk of a tile of the latent `frame` [B, 1, h, w, C]."""
        rows, cols = tiling.spans(tile)
        (result,) = self._slice.run([frame[:, :, slice(*rows), slice(*cols)].contiguous()], state)
        return result

    def _send(self, tile: Tensor) -> Pending:
        return self._comm.exchange(sends=[(tile, 0)])

    def _receive(
        self, tiling: Tiling, dealt: tuple[tuple[int, ...], ...], latent: LatentShape, *, first: bool | None
    ) -> tuple[dict[int, Tensor], Pending]:
        """Buffers into which the others' tiles are arriving: one chunk of each, or with `first` None the clip."""
        buffers, receives = {}, []
        for rank, tiles in enumerate(dealt):
            for tile in tiles if rank else ():
                b, t, h, w, c = self._target.shape(tiling.latent(tile, latent), first=bool(first))
                shape = (b, latent.frames if first is None else t, h, w, c)
                buffers[tile] = torch.empty(shape, dtype=self._vae.dtype, device=self._vae.device)
                receives.append((buffers[tile], rank))
        return buffers, self._comm.exchange(receives=receives)


def _in_order(tiles: dict[int, Tensor]) -> list[Tensor]:
    return [tiles[index] for index in sorted(tiles)]
