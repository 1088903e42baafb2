"""The whole program on one rank."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cosmos3_pipeline.vae.pixels import as_pixels, latent_chunk, picture_chunk, picture_chunks
from cosmos3_pipeline.vae.strategy import Direction, Pixels
from cosmos3_pipeline.vae.weights import BoundVae


class ReplicatedRunner:
    """Runs all ops on every chunk."""

    def __init__(self, vae: BoundVae, direction: Direction) -> None:
        self._slice = vae.slice(direction)

    def stream(self, z: Tensor, *, pixels: Pixels) -> Iterator[Tensor]:
        """Yields each portion of the picture on every rank."""
        state = self._slice.state(z.shape[2])
        for index in range(z.shape[2]):
            for (picture,) in self._slice.portions([[latent_chunk(z, index)]], state):
                yield as_pixels(picture, pixels)

    def encode(self, x: Tensor) -> Tensor:
        """[B, 3, F, H, W] -> moments [B, 2 * z_dim, T, h, w]."""
        chunks = picture_chunks(x.shape[2])
        state = self._slice.state(chunks)
        moments = [self._slice.run([picture_chunk(x, index)], state)[0] for index in range(chunks)]
        return torch.cat(moments, dim=1).permute(0, 4, 1, 2, 3).contiguous()
