"""A video that follows control clips, chunk after chunk.

Packing, schedule, solver and guidance are diffusers' blocks of `Cosmos3TransferCoreDenoiseStep`. `ChunkedStage`
replaces its loop over chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.modular_pipelines.cosmos.before_denoise import (
    Cosmos3PrepareTextSegmentsStep,
    Cosmos3TransferPackSequenceStep,
    Cosmos3TransferPrepareLatentsStep,
    Cosmos3TransferSetTimestepsStep,
)
from diffusers.modular_pipelines.cosmos.denoise import Cosmos3TransferDenoiseStep
from PIL import Image
from torch import Tensor

from cosmos3_pipeline.config.schema import OutputConfig, SamplerConfig, TaskConfig
from cosmos3_pipeline.config.tasks import controls_of
from cosmos3_pipeline.denoise.transfer import ParallelTransferDenoiser
from cosmos3_pipeline.planning.chunks import Chunks
from cosmos3_pipeline.stages.chunked import ChunkedStage, ChunkMaker, of_chunks
from cosmos3_pipeline.stages.context import RunContext
from cosmos3_pipeline.stages.controls import ControlClip, first_frames
from cosmos3_pipeline.stages.denoise import ReportStep, sea_cache
from cosmos3_pipeline.stages.files import CONTROL_FILE
from cosmos3_pipeline.stages.media.writing import VideoWriter, write_video

# Tensors of one chunk, as large as its latents. They are dropped after denoising: nothing reads them again.
OF_A_CHUNK = (
    *("control_latents", "x0_tokens_vision", "condition_latents", "velocity", "velocity_mask"),
    *("cond_full_static", "cond_no_control_static", "uncond_full_static"),
    *("vision_tokens_full", "vision_tokens_target"),
)


class TransferStage(ChunkedStage):
    """As `ChunkedStage`. `output.control` writes the control pictures that the model gets."""

    def __init__(
        self, task: TaskConfig, sampler: SamplerConfig, output: OutputConfig, chunks: Chunks, *, stays: bool
    ) -> None:
        super().__init__(chunks, keep_latents=output.latents)
        self._task = task
        self._sampler = sampler
        self._output = output
        self._stays = stays

    def begin(self, context: RunContext, stack: ExitStack) -> ChunkMaker:
        """Prepare what all chunks share: controls, positions of the prompts' tokens, the generator of noise."""
        parts = context.components
        controls = [ControlClip(name, self._task, context.clip, self._chunks) for name in controls_of(self._task)]
        denoiser = ParallelTransferDenoiser(
            context.mesh,
            layers=parts.transformer(),
            texts=parts.texts,
            guidance_interval=self._sampler.guidance_interval,
            control_interval=self._task.control_guidance_interval,
            cache=sea_cache(self._sampler.cache),
            counts=context.passes,
            keep_texts=True,
        )
        with context.measure("denoise"):
            state = context.state
            state.set("num_inference_steps", self._sampler.steps)
            state.set("guidance_scale", self._sampler.guidance_scale)
            state.set("control_guidance", self._task.control_guidance)
            state.set("generator", torch.Generator("cpu").manual_seed(self._sampler.seed))
            Cosmos3PrepareTextSegmentsStep()(parts.pipeline, state)
        writer = self._control_writer(context, stack, len(controls))
        return _Transfer(self._task, self._sampler, self._chunks, self._stays, controls, writer, denoiser)

    def _control_writer(self, context: RunContext, stack: ExitStack, controls: int) -> VideoWriter | None:
        """The writer of the controls side by side. None without `output.control`, or on a rank without files."""
        if not (self._output.control and context.is_root):
            return None
        output = self._output
        video = write_video(
            context.directory / CONTROL_FILE,
            height=context.clip.height,
            width=context.clip.width * controls,
            fps=context.fps,
            crf=output.crf,
            preset=output.preset,
            encoder=output.encoder,
        )
        return stack.enter_context(video)


@dataclass(frozen=True)
class _Transfer:
    """Makes the chunks of a transfer, see `ChunkMaker`. `writer`, if there is one, writes the controls."""

    task: TaskConfig
    sampler: SamplerConfig
    chunks: Chunks
    stays: bool
    controls: list[ControlClip]
    writer: VideoWriter | None
    denoiser: ParallelTransferDenoiser

    def encode(self, context: RunContext, number: int, seed: Tensor | None) -> None:
        """Leave latents in the state: of the controls, and of the frames with which the chunk begins."""
        with context.measure("encode"):
            pictures = [control.chunk(number) for control in self.controls]
            if self.writer is not None:
                _write_controls(self.writer, pictures, self.chunks.written(number))
            self._encode(context, number, pictures, None if seed is None else seed.transpose(0, 1)[None])
        context.inputs |= {control.key: control.changes for control in self.controls}

    def _encode(
        self, context: RunContext, number: int, pictures: Sequence[Sequence[Image.Image]], seed: Tensor | None
    ) -> None:
        """As `encode`, from the `pictures` of the controls and the frames `seed` [1, 3, frames, H, W].

        diffusers fills the chunk with copies of the last seed frame and encodes the whole chunk. Here only the
        seed frames are encoded. Their latents are the same, because the encoder is causal; the others become
        noise.
        """
        parts, clip, chunks = context.components, context.clip, self.chunks
        parts.vae(encoder=True)
        pipeline, clean = parts.pipeline, chunks.clean(number)
        if number == 0 and clean:
            given, context.inputs["task.video"] = first_frames(self.task, clip, clean)
            seed = _as_floats(context, given, parts.pipeline.vae.dtype)
        latents = torch.zeros(
            *(1, pipeline.vae.config.z_dim, clip.latent_frames, clip.latent_rows, clip.latent_cols),
            device=parts.device,
        )
        if clean:
            assert seed is not None
            known = chunks.clean_latents(number, clip.temporal)
            encoded = pipeline._encode_video(seed[:, :, : (known - 1) * clip.temporal + 1].contiguous())
            latents[:, :, :known] = encoded.float()
        # diffusers gives the encoder controls in the transformer's dtype.
        dtype = pipeline.transformer.dtype
        controls = [pipeline._encode_video(_as_floats(context, control, dtype)).float() for control in pictures]
        context.state.set("control_latents", controls)
        context.state.set("x0_tokens_vision", latents)
        context.state.set("current_conditional_frames", clean)

    def denoise(self, context: RunContext, number: int) -> None:
        """Leave the chunk's latents [1, C, T, h, w] in the state."""
        parts, state, of = context.components, context.state, of_chunks(number, self.chunks)
        with context.measure("denoise"):
            parts.scheduler()
            parts.load_vision()
            for block in (Cosmos3TransferPrepareLatentsStep(), Cosmos3TransferPackSequenceStep()):
                block(parts.pipeline, state)
            Cosmos3TransferSetTimestepsStep()(parts.pipeline, state)
            loop = Cosmos3TransferDenoiseStep()
            loop.set_progress_bar_config(disable=True)
            loop.sub_blocks["denoiser"] = self.denoiser
            with context.reporter.track(f"denoising steps{of}", self.sampler.steps) as advance:
                loop.sub_blocks["report"] = ReportStep(advance)
                loop(parts.pipeline, state)
            parts.scheduler().set_timesteps(1)  # drops the outputs of earlier steps
            for name in OF_A_CHUNK:
                state.set(name, None)
            if not self.stays:
                parts.transformer().release()


def _as_floats(context: RunContext, pictures: Sequence[Image.Image], dtype: torch.dtype) -> Tensor:
    """Pictures in the size of the clip, in the form that diffusers takes: [1, 3, F, H, W] in [-1, 1]."""
    processor, clip = context.components.pipeline.video_processor, context.clip
    video: Tensor = processor.preprocess_video(list(pictures), height=clip.height, width=clip.width)
    return video.to(device=context.components.device, dtype=dtype)


def _write_controls(writer: VideoWriter, pictures: Sequence[Sequence[Image.Image]], frames: range) -> None:
    """Append `frames` of all controls of a chunk, side by side."""
    for frame in frames:
        writer.write(np.concatenate([np.asarray(control[frame]) for control in pictures], axis=1)[None])
