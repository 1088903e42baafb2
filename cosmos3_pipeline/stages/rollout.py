"""Forward dynamics over more actions than a chunk has: each chunk begins with the last frame of the previous one.

NVIDIA's cookbook calls diffusers' pipeline once per chunk in the same way (`run_rollout` in NVIDIA/cosmos
`cookbooks/cosmos3/generator/action/run_fd_with_diffusers.ipynb`). The frame is a picture of 8 bits. Each chunk has
its own actions and noise. The cookbook drops the first frame of the first chunk; here the frame is kept.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cosmos3_pipeline.config.schema import OutputConfig, SamplerConfig, TaskConfig
from cosmos3_pipeline.denoise.denoiser import ParallelLoopDenoiser
from cosmos3_pipeline.planning.actions import ActionTask
from cosmos3_pipeline.planning.chunks import Chunks
from cosmos3_pipeline.stages.actions import (
    ActionDenoiseStage,
    ActionEncodeStage,
    content_latents,
    leave_latents,
)
from cosmos3_pipeline.stages.chunked import ChunkedStage, ChunkMaker
from cosmos3_pipeline.stages.context import RunContext
from cosmos3_pipeline.stages.denoise import DenoiseStage


class RolloutStage(ChunkedStage):
    """As `ChunkedStage`, for a task whose actions are inputs."""

    def __init__(
        self,
        task: TaskConfig,
        sampler: SamplerConfig,
        output: OutputConfig,
        action: ActionTask,
        chunks: Chunks,
        *,
        stays: bool,
    ) -> None:
        super().__init__(chunks, keep_latents=output.latents)
        self._task = task
        self._sampler = sampler
        self._action = action
        self._stays = stays

    def begin(self, context: RunContext, stack: ExitStack) -> ChunkMaker:
        """The maker of all chunks. Its denoiser keeps the encoded prompts from chunk to chunk."""
        denoiser = DenoiseStage(self._sampler).denoiser(context, keep_texts=True)
        return _Rollout(self._task, self._sampler, self._action, self._stays, denoiser)


@dataclass(frozen=True)
class _Rollout:
    """Makes the chunks of a rollout, see `ChunkMaker`."""

    task: TaskConfig
    sampler: SamplerConfig
    action: ActionTask
    stays: bool
    denoiser: ParallelLoopDenoiser

    def encode(self, context: RunContext, number: int, seed: Tensor | None) -> None:
        """Leave the latents of the frame with which the chunk begins in the state."""
        if seed is None:
            ActionEncodeStage(self.task, self.action)(context)
            return
        with context.measure("encode"), torch.no_grad():
            leave_latents(context, self.action, self._latents(context, seed))

    def _latents(self, context: RunContext, seed: Tensor) -> Tensor:
        """The latents of bytes [frames, H, W, 3], on the canvas of the first chunk.

        diffusers' pipeline would choose the canvas by the shape of the frame. In small tiers that canvas may
        differ from the first chunk's, or be too small for the frame. The arithmetic is that of diffusers'
        `VideoProcessor` and `_prepare_action_video_conditioning`.
        """
        assert self.action.canvas is not None
        (height, width), clip = self.action.canvas, context.clip
        dtype = context.components.vae(encoder=True).dtype
        pictures = (2.0 * (seed.permute(0, 3, 1, 2).float() / 255.0) - 1.0).to(dtype)
        right, bottom = width - clip.width, height - clip.height
        reflects = right < clip.width and bottom < clip.height
        padded = functional.pad(pictures, (0, right, 0, bottom), mode="reflect" if reflects else "replicate")
        size = torch.tensor([height, width, clip.height, clip.width])
        return content_latents(context, padded.transpose(0, 1)[None].contiguous(), size)

    def denoise(self, context: RunContext, number: int) -> None:
        """Leave the chunk's latents [1, C, T, h, w] in the state."""
        for name in ("latents", "action_latents"):
            context.state.set(name, None)  # otherwise diffusers takes them for this chunk's noise
        stage = ActionDenoiseStage(
            self.task, self.sampler, self.action, chunk=number, denoiser=self.denoiser, stays=self.stays
        )
        stage(context)
