"""diffusers' own VAE on every rank, for runs that are compared with diffusers bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.plugins import REFERENCE, discover
from cosmos3_pipeline.vae.program import Direction, Program
from cosmos3_pipeline.vae.strategy import Exactness, OwnRunner, Runner, StrategyPlan

if TYPE_CHECKING:
    from torch import Tensor

    from cosmos3_pipeline.distributed.comm import Comm
    from cosmos3_pipeline.vae.pixels import Pixels
    from cosmos3_pipeline.vae.weights import BoundVae

# Peak memory of activations beside that of this package's ops. On a CPU in float32 it was 6.4 times as much for
# encode and 8 times for decode, because PyTorch unfolds the input of a small convolution. A rehearsal for an
# accelerator counted 1.9.
ON_HOST, ON_ACCELERATOR = 8, 2
# Its decoder appends every chunk to the picture, which is copied each time, and clamps the whole picture.
PICTURES = 3


@dataclass
class OfDiffusers(OwnRunner):
    """`AutoencoderKLWan` computes everything on every rank, with nothing sent.

    Its convolutions and norms sum in another order than those of this package, so results differ by rounding.
    """

    name: ClassVar[str] = "diffusers"
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def plan(self, program: Program, shape: LatentShape, ranks: int) -> StrategyPlan:
        """The plan of the reference, with the memory that diffusers takes beside it (an estimate)."""
        plan = discover().strategies[REFERENCE]().plan(program, shape, ranks)
        picture = 0
        if program.direction == "decode":
            sides = shape.rows * shape.cols * program.spatial**2
            frames = program.picture_frames(shape.frames)
            picture = shape.batch * program.picture_channels * frames * sides * shape.element_bytes
        times = ON_HOST if shape.on_host else ON_ACCELERATOR
        shares = tuple(
            replace(share, activation_bytes=times * share.activation_bytes + PICTURES * picture)
            for share in plan.shares
        )
        note = "diffusers' own kernels"
        return replace(
            plan,
            strategy=self.name,
            exactness=self.exactness,
            shares=shares,
            note=note,
            assignment=None,
            clip=None,
        )

    def runner(self, vae: BoundVae, comm: Comm, direction: Direction) -> Runner:
        """The runner of `direction` on this rank."""
        return _OfDiffusersRunner(vae, direction)


class _OfDiffusersRunner:
    """Calls diffusers' model. It holds the weights of its direction only."""

    def __init__(self, vae: BoundVae, direction: Direction) -> None:
        self._autoencoder = vae.autoencoder(direction)
        self._temporal = vae.program(direction).temporal

    def stream(self, z: Tensor, *, pixels: Pixels) -> Iterator[Tensor]:
        """Yields the frames of each latent frame on every rank, after the whole clip was decoded."""
        from cosmos3_pipeline.vae.pixels import as_pixels

        picture = self._autoencoder.decode(z).sample
        portions = [1] + [self._temporal] * (z.shape[2] - 1)
        for portion in picture.split(portions, dim=2):
            yield as_pixels(portion, pixels)

    def encode(self, x: Tensor) -> Tensor:
        """[B, 3, F, H, W] -> moments [B, 2 * z_dim, T, h, w]."""
        moments: Tensor = self._autoencoder.encode(x).latent_dist.parameters
        return moments
