"""The clips on which a strategy is tested, and tiny random VAEs of both kinds. Importing it imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.program import ENCODE_CHUNK, Direction, Program, program_for
from cosmos3_pipeline.vae.strategy import DeclarationError, Strategy, StrategyError

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from torch import Tensor

WAN22: dict[str, Any] = {
    "base_dim": 8,
    "decoder_base_dim": 8,
    "z_dim": 6,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
}
WAN21: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
}
DIRECTIONS: tuple[Direction, ...] = ("decode", "encode")
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
# Standard deviation of the decoder's output: large, but values are rarely clamped to [-1, 1].
PICTURE_STD = 0.35


@dataclass(frozen=True)
class Case:
    """A clip of `batch` x `frames` x `rows` x `cols` latents for the VAE `config` in `dtype`."""

    name: str
    config: Mapping[str, Any]
    dtype: str
    batch: int
    frames: int
    rows: int
    cols: int

    @property
    def shape(self) -> LatentShape:
        return LatentShape(self.batch, self.frames, self.rows, self.cols, ELEMENT_BYTES[self.dtype])

    def program(self, direction: Direction) -> Program:
        return program_for(direction, self.config)

    def chunks(self) -> int:
        """The number of chunks in which the clip is decoded."""
        return self.program("decode").chunks(self.shape)

    def autoencoder(self) -> AutoencoderKLWan:
        """The VAE in float32, the same in every process."""
        import torch
        from diffusers import AutoencoderKLWan

        generator = torch.Generator().manual_seed(17)
        config = {**self.config, "latents_mean": [0.0] * self.config["z_dim"]}
        vae = AutoencoderKLWan(**config, latents_std=[1.0] * self.config["z_dim"]).eval().requires_grad_(False)
        for name, p in vae.named_parameters():
            # Gains and biases are random too, so that tests notice a dropped or misplaced one.
            if name.endswith("gamma"):
                p.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("bias"):
                p.uniform_(-0.2, 0.2, generator=generator)
            else:
                p.normal_(0, (1.5 / p[0].numel()) ** 0.5, generator=generator)
        with torch.no_grad():
            vae.decoder.conv_out.weight.mul_(0.1)
            vae.decoder.conv_out.bias.mul_(0.1)
            z = torch.randn(1, self.config["z_dim"], 1, 4, 4, generator=generator)
            vae.decoder.conv_out.weight.mul_(PICTURE_STD / vae.decode(z).sample.std())
        return vae

    def latents(self, seed: int) -> Tensor:
        """[B, z_dim, T, h, w]."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        size = (self.batch, self.config["z_dim"], self.frames, self.rows, self.cols)
        return torch.randn(size, generator=generator).to(getattr(torch, self.dtype))

    def picture(self, seed: int) -> Tensor:
        """[B, 3, F, H, W] in [-1, 1], with as many chunks as the latents; if several, plus two extra frames."""
        import torch

        program = self.program("encode")
        frames = 1 + ENCODE_CHUNK * (self.chunks() - 1) + (2 if self.chunks() > 1 else 0)
        generator = torch.Generator().manual_seed(seed)
        size = (self.batch, 3, frames, self.rows * program.spatial, self.cols * program.spatial)
        return (torch.rand(size, generator=generator) * 2 - 1).to(getattr(torch, self.dtype))


CLIP = Case("clip", WAN22, "float32", batch=1, frames=5, rows=5, cols=4)
CASES = (
    CLIP,  # five chunks: no number of ranks from 2 to 4 divides them, nor the rows
    Case("image", WAN22, "float32", batch=1, frames=1, rows=7, cols=5),
    # More than one tile in both directions, and large enough for convolutions that compute frames in pairs.
    Case("tall", WAN22, "float32", batch=1, frames=2, rows=35, cols=5),
    Case("two clips", WAN21, "float32", batch=2, frames=4, rows=4, cols=7),
    Case("bfloat16", WAN22, "bfloat16", batch=1, frames=4, rows=6, cols=4),
    # Longer than all temporal caches reach together, which is 30 latent frames. A strategy that drops some past
    # frames fails here.
    Case("long", WAN22, "float32", batch=1, frames=37, rows=2, cols=2),
)


def refuses(strategy: Strategy, case: Case, ranks: int, direction: Direction) -> bool:
    """Whether the plan of one direction refuses `case` on this number of ranks.

    A plan that is less exact than declared is no refusal: the test that runs the case then fails.
    """
    try:
        strategy.plan(case.program(direction), case.shape, ranks)
    except StrategyError as error:
        return not isinstance(error, DeclarationError)
    return False


def honours(strategy: Strategy, case: Case, ranks: int) -> bool:
    """Whether the plans of all directions of the strategy accept `case` on this number of ranks."""
    return not any(refuses(strategy, case, ranks, d) for d in DIRECTIONS if d in strategy.directions)
