"""The picked strategy's runner, bound when a clip has come."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.vae.inputs import latent_shape
from cosmos3_pipeline.vae.strategy import Direction, Pixels, Runner, Strategy
from cosmos3_pipeline.vae.weights import BoundVae
from cosmos3_plugins.auto import Auto


class PickingRunner:
    """Picks for every clip anew, and keeps the runner of the last pick."""

    def __init__(self, vae: BoundVae, comm: Comm, direction: Direction, strategy: Auto) -> None:
        self._vae = vae
        self._comm = comm
        self._direction: Direction = direction
        self._strategy = strategy
        self._bound: tuple[Strategy, Runner] | None = None

    def stream(self, z: Tensor, *, pixels: Pixels) -> Iterator[Tensor]:
        """Yields the picture on the root, as a strategy does that does not run everywhere."""
        for chunk in self._runner(z).stream(z, pixels=pixels):
            if self._comm.is_root:
                yield chunk

    def encode(self, x: Tensor) -> Tensor:
        """[B, 3, F, H, W] -> moments [B, 2 * z_dim, T, h, w], on every rank."""
        return self._runner(x).encode(x)

    def _runner(self, given: Tensor) -> Runner:
        program = self._vae.program(self._direction)
        picked = self._strategy.settled(program, latent_shape(program, given), self._comm.size)
        if self._bound is None or self._bound[0] != picked:
            self._bound = None  # its weights go before others come
            self._bound = picked, picked.runner(self._vae, self._comm, self._direction)
        return self._bound[1]
