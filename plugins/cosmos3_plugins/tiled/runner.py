"""Computes one rank's tiles; the root blends all tiles."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from cosmos3_pipeline.plugin_api import (
    BoundVae,
    Comm,
    Direction,
    Execution,
    Flow,
    Frames,
    LatentShape,
    Pending,
    Pixels,
    as_pixels,
    latent_chunk,
    latent_shape,
    picture_chunk,
)
from cosmos3_plugins.tiled import Tiled
from cosmos3_plugins.tiled.blend import blend
from cosmos3_plugins.tiled.tiles import Tiling, of_tile, on_tiles


class TiledRunner:
    """Runs all ops on the tiles of this rank."""

    def __init__(self, vae: BoundVae, comm: Comm, direction: Direction, strategy: Tiled) -> None:
        self._vae = vae
        self._comm = comm
        self._strategy = strategy
        self._program = vae.program(direction)
        self._on_tiles = on_tiles(self._program)
        # The last op of the decoder has no weights, so every rank may hold it; only the root runs it.
        self._ops = vae.bind(direction, range(len(self._program)))
        self._target = self._on_tiles.ops[-1].target

    def stream(self, z: Tensor, *, pixels: Pixels) -> Iterator[Tensor]:
        """Yields each chunk of the blended picture on the root; the other ranks send tiles and yield nothing."""
        latent = latent_shape(self._program, z)
        tiling = self._strategy.tiling(self._program, latent)
        dealt = tiling.dealt(self._comm.size)
        own = {tile: self._chunks(z, tiling, tile, latent) for tile in dealt[self._comm.rank]}
        leaving: list[Pending] = []
        for index in range(latent.frames):
            if not self._comm.is_root:
                # One chunk may be in flight while the next is computed. More chunks would fill the memory.
                before, leaving = leaving, []
                for chunks in own.values():
                    leaving.append(self._comm.exchange(sends=[(next(chunks), 0)]))
                for pending in before:
                    pending.wait()
                continue
            tiles, arriving = self._receive(tiling, dealt, latent, first=index == 0)
            for tile, chunks in own.items():
                tiles[tile] = next(chunks)
            arriving.wait()
            at = Frames(blend(_in_order(tiles), tiling, self._target.scale))
            del tiles
            flow = Flow(at, [], {}, first=index == 0, exchange=None)
            del at
            self._ops[len(self._program) - 1].run(flow)
            picture = as_pixels(flow.at.buffer, pixels)
            del flow
            yield picture
            del picture
        for pending in leaving:
            pending.wait()

    def encode(self, x: Tensor) -> Tensor:
        """[B, 3, F, H, W] -> moments [B, 2 * z_dim, T, h, w], blended on the root and broadcast."""
        latent = latent_shape(self._program, x)
        tiling = self._strategy.tiling(self._program, latent)
        dealt = tiling.dealt(self._comm.size)
        # Tile by tile, so that the temporal cache of only one tile is in memory.
        done = {
            tile: torch.cat(list(self._chunks(x, tiling, tile, latent)), dim=1) for tile in dealt[self._comm.rank]
        }
        if self._comm.is_root:
            tiles, arriving = self._receive(tiling, dealt, latent, first=None)
            arriving.wait()
            whole = blend(_in_order(tiles | done), tiling, 1)
        else:
            for pending in [self._comm.exchange(sends=[(tile, 0)]) for tile in done.values()]:
                pending.wait()
            shape = (latent.batch, latent.frames, latent.rows, latent.cols, 2 * self._program.z_dim)
            whole = x.new_empty(shape)
        self._comm.broadcast(whole)
        return whole.permute(0, 4, 1, 2, 3).contiguous()

    def _chunks(self, given: Tensor, tiling: Tiling, tile: int, latent: LatentShape) -> Iterator[Tensor]:
        """Yields each chunk of a finished tile [B, T, h, w, C]."""
        scale = self._program.ops[0].source.scale
        (top, bottom), (left, right) = ([edge * scale for edge in span] for span in tiling.spans(tile))
        own = given[:, :, :, top:bottom, left:right]
        chunk_of = latent_chunk if self._program.direction == "decode" else picture_chunk
        lowered = of_tile(self._program, tiling.latent(tile, latent))
        results = Execution(lowered, 0, self._ops, self._comm, partial(chunk_of, own)).results()
        for index in range(len(lowered.layouts)):
            parts = self._program.portions_at(len(self._on_tiles), first=index == 0)
            yield torch.cat(list(islice(results, parts)), dim=1)

    def _receive(
        self, tiling: Tiling, dealt: tuple[tuple[int, ...], ...], latent: LatentShape, *, first: bool | None
    ) -> tuple[dict[int, Tensor], Pending]:
        """Start to receive the tiles of other ranks: one chunk of each, or the whole clip if `first` is None."""
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
