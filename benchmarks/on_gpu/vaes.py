"""The VAE of a published size with random weights, and its input clips."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos3_pipeline import compose
from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.config.schema import ModelConfig
from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.jobs.verify.distance import Distance
from cosmos3_pipeline.models.toy import make_vae
from cosmos3_pipeline.plugin_api import Direction, Program, Strategy
from cosmos3_pipeline.vae.parallel_vae import ParallelVAE
from cosmos3_pipeline.vae.program import program_for
from cosmos3_plugins.replicated import Replicated

# How long a rank waits for a message before it reports which rank is late.
PATIENCE = timedelta(seconds=40)


def model_config(name: str) -> ModelConfig:
    """The model option `name` of conf/model."""
    return compose([f"model={name}"]).model


def vae_dimensions(name: str) -> dict[str, Any]:
    """The VAE of the model option `name`, as `AutoencoderKLWan` names its dimensions."""
    dimensions: dict[str, Any] = plain(model_config(name).vae)
    return dimensions


@dataclass(frozen=True)
class Clip:
    """A clip of `frames` x `rows` x `cols` latents in `dtype`, to decode or encode (`direction`)."""

    direction: Direction
    dtype: torch.dtype
    frames: int
    rows: int
    cols: int

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.direction}, {dtype}, {self.frames} latent frames of {self.rows} x {self.cols}"


class Vaes:
    """The VAE in each dtype, with random weights. Every rank has the same weights."""

    def __init__(self, dimensions: dict[str, Any], device: torch.device) -> None:
        self.device = device
        self.programs: dict[Direction, Program] = {
            "decode": program_for("decode", dimensions),
            "encode": program_for("encode", dimensions),
        }
        self.models = {torch.float32: make_vae(dimensions, device)}
        self.models[torch.bfloat16] = make_vae(dimensions, device).to(torch.bfloat16)
        groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        self._alone = groups[dist.get_rank()]

    def alone(self, dtype: torch.dtype) -> ParallelVAE:
        """The VAE on this rank alone."""
        return ParallelVAE(self.models[dtype], Replicated(), Replicated(), group=self._alone)

    def together(self, clip: Clip, strategy: Strategy) -> ParallelVAE:
        """The VAE on all ranks, with `strategy`."""
        encode, decode = (strategy if clip.direction == way else Replicated() for way in ("encode", "decode"))
        messages = Comm(device=self.device, patience=PATIENCE)
        return ParallelVAE(self.models[clip.dtype], encode, decode, comm=messages)

    def given(self, clip: Clip) -> Tensor:
        """The input latents or picture in float32, the same on all ranks."""
        generator, program = torch.Generator().manual_seed(0), self.programs[clip.direction]
        if clip.direction == "decode":
            drawn = torch.randn(1, program.z_dim, clip.frames, clip.rows, clip.cols, generator=generator)
        else:
            frames, scale = program.picture_frames(clip.frames), program.spatial
            drawn = torch.rand(1, 3, frames, clip.rows * scale, clip.cols * scale, generator=generator) * 2 - 1
        return drawn.to(self.device)


def result_of(vae: Any, direction: Direction, given: Tensor) -> Tensor:
    """The result of a VAE, ours or diffusers', for the input `given`."""
    made: Tensor = vae.decode(given).sample if direction == "decode" else vae.encode(given).latent_dist.mode()
    return made


def in_words(distance: Distance) -> str:
    return "equal" if distance.equal else f"{distance.psnr:.1f} dB"
