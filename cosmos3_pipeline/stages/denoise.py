"""Noise to latents: the sampler's steps, each a guided velocity from the transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import SeaCacheConfig
from diffusers.modular_pipelines.cosmos.modular_blocks_cosmos3 import (
    Cosmos3VisionCoreDenoiseStep,
    Cosmos3VisionSoundCoreDenoiseStep,
)
from diffusers.modular_pipelines.cosmos.modular_blocks_cosmos3_distilled import (
    Cosmos3DistilledVisionCoreDenoiseStep,
)
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, SequentialPipelineBlocks

from cosmos3_pipeline.checkpoint.weights import VISION_ALONE
from cosmos3_pipeline.config.schema import CacheConfig, CacheName, SamplerConfig
from cosmos3_pipeline.denoise.denoiser import ParallelLoopDenoiser
from cosmos3_pipeline.stages.context import RunContext
from cosmos3_pipeline.stages.progress import Advance

# diffusers' workflow for each set of modalities that are denoised together. A distilled checkpoint has another
# workflow, for vision alone.
WORKFLOWS: Mapping[frozenset[str], type[SequentialPipelineBlocks]] = {
    VISION_ALONE: Cosmos3VisionCoreDenoiseStep,
    frozenset({"vision", "sound"}): Cosmos3VisionSoundCoreDenoiseStep,
}
# Entries that the workflows leave in the state and that no later stage reads: tensors of the size of the latents,
# and several numbers for each token.
LEFT_OVER = (
    *("vision_tokens", "velocity_vision", "vision_conditioning_latents"),
    *("sound_tokens", "velocity_sound", "sound_scheduler"),
    *("cond_vision_segment", "uncond_vision_segment", "vision_timesteps"),
    *("cond_sound_segment", "uncond_sound_segment", "sound_timesteps"),
    *("cond_position_ids", "uncond_position_ids"),
)


class DenoiseStage:
    """Leaves `latents`, the denoised latents [1, C, T, h, w] in fp32, in the state.

    With `sound` among the `modalities` it also leaves `sound_latents` [C, T]. The noise of the sound is drawn
    after the noise of the picture.

    With `sampler.guidance_scale` 1.0, and in steps outside of `sampler.guidance_interval`, only the prompt is run,
    without guidance. `sampler.cache` skips passes whose latents hardly change. The noise is drawn from
    `sampler.seed` on the CPU, in fp32 and whole, so it is the same on every rank, device and layout. The noise
    that each step of a distilled checkpoint adds is also the same, because the steps use the same generator.

    Packing, schedule and solver are diffusers' workflow. A distilled checkpoint uses diffusers' workflow of fixed
    steps. Its denoiser block is replaced by a block that computes the text once and splits guidance and sequence
    over the mesh. The transformer is removed from the device in the end, unless it `stays` for a next clip.
    """

    def __init__(
        self, sampler: SamplerConfig, *, modalities: frozenset[str] = VISION_ALONE, stays: bool = False
    ) -> None:
        self._sampler = sampler
        self._modalities = modalities
        self._stays = stays

    def __call__(self, context: RunContext) -> None:
        with context.measure("denoise"):
            context.components.scheduler()
            context.components.load_vision()
            state = context.state
            state.set("num_inference_steps", self._sampler.steps)
            state.set("guidance_scale", self._sampler.guidance_scale)
            state.set("generator", torch.Generator("cpu").manual_seed(self._sampler.seed))
            with context.reporter.track(self.title(context), self._sampler.steps) as advance:
                self.workflow(context, advance)(context.components.pipeline, state)
            # Decoding needs their memory.
            context.components.scheduler().set_timesteps(1)  # drops the outputs of earlier steps
            for name in LEFT_OVER:
                state.set(name, None)
            if not self._stays:
                context.components.transformer().release()

    def title(self, context: RunContext) -> str:
        """The title of the progress bar."""
        return "denoising steps"

    def workflow(self, context: RunContext, advance: Advance) -> SequentialPipelineBlocks:
        """diffusers' denoising workflow with this run's denoiser, which calls `advance` after every step."""
        workflow = self.blocks(context)
        loop = workflow.sub_blocks["denoise"]
        loop.set_progress_bar_config(disable=True)
        loop.sub_blocks["denoiser"] = self.denoiser(context)
        loop.sub_blocks["report"] = ReportStep(advance)
        return workflow

    def blocks(self, context: RunContext) -> SequentialPipelineBlocks:
        """diffusers' workflow for the modalities of this run, with diffusers' denoiser."""
        distilled = context.components.checkpoint.sampler.distilled_sigmas is not None
        return Cosmos3DistilledVisionCoreDenoiseStep() if distilled else WORKFLOWS[self._modalities]()

    def denoiser(self, context: RunContext, *, keep_texts: bool = False) -> ParallelLoopDenoiser:
        """The block that predicts the velocity of one step. With `keep_texts` it serves all chunks of a clip."""
        parts = context.components
        return ParallelLoopDenoiser(
            context.mesh,
            layers=parts.transformer(),
            texts=parts.texts,
            guidance_interval=self._sampler.guidance_interval,
            cache=sea_cache(self._sampler.cache),
            counts=context.passes,
            keep_texts=keep_texts,
        )


def sea_cache(settings: CacheConfig) -> SeaCacheConfig | None:
    """diffusers' settings of the cache, or None if there is no cache."""
    if settings.name is CacheName.none:
        return None
    return SeaCacheConfig(
        threshold=settings.threshold,
        residual_order=settings.residual_order,
        retention_steps=settings.retention_steps,
        cache_end_steps=settings.cache_end_steps,
        max_consecutive_cached=settings.max_consecutive_cached,
        power_exp=settings.power_exp,
    )


class ReportStep(ModularPipelineBlocks):  # type: ignore[misc] # diffusers is untyped
    """The last block of the loop: reports that a step is done."""

    model_name = "cosmos3-omni"

    def __init__(self, advance: Advance) -> None:
        super().__init__()
        self._advance = advance

    def __call__(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> tuple[Any, Any]:
        self._advance()
        return components, block_state
