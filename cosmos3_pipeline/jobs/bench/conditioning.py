"""The condition of an image-to-video run, from a photograph to latents: by diffusers and by our stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from diffusers.modular_pipelines.cosmos.encoders import Cosmos3ImageVaeEncoderStep
from diffusers.modular_pipelines.cosmos.modular_blocks_cosmos3 import Cosmos3OmniBlocks
from diffusers.modular_pipelines.cosmos.modular_pipeline import Cosmos3OmniModularPipeline
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from torch import Tensor

from cosmos3_pipeline.config.schema import TaskConfig
from cosmos3_pipeline.jobs.bench.given import Given
from cosmos3_pipeline.models.loading import Components
from cosmos3_pipeline.plan.geometry import Clip
from cosmos3_pipeline.stages.context import RunContext
from cosmos3_pipeline.stages.encode import EncodeStage
from cosmos3_pipeline.stages.media import read_image


class VaeAlone:
    """The components of a run of which only the VAE is there: what the encoding stage asks for."""

    def __init__(self, vae: Any) -> None:
        self.pipeline = Cosmos3OmniModularPipeline(blocks=Cosmos3OmniBlocks())
        self.pipeline.update_components(vae=vae)

    def vae(self, *, encoder: bool) -> Any:
        """The VAE, which has its encoder."""
        return self.pipeline.vae


def by_diffusers(vae: Any, given: Given) -> Tensor:
    """Its block on the whole length of the clip. Returns the conditioned latent frame [1, C, 1, h, w]."""
    inputs = PipelineState()
    _, _, frames, height, width = given.tensor.shape
    for key, value in {"height": height, "width": width, "num_frames": frames}.items():
        inputs.set(key, value)
    inputs.set("image", read_image(str(given.photograph)))
    Cosmos3ImageVaeEncoderStep()(VaeAlone(vae).pipeline, inputs)
    return _first(inputs.get("x0_tokens_vision"))


def by_stage(vae: Any, given: Given) -> Tensor:
    """The encoding stage of a run. Returns the conditioned latent frame [1, C, 1, h, w]."""
    _, _, frames, height, width = given.tensor.shape
    config = vae.config
    clip = Clip(height, width, frames, config.scale_factor_spatial, config.scale_factor_temporal, patch=2)
    components = cast(Components, VaeAlone(vae))
    context = RunContext(components, clip, fps=24.0, directory=Path())
    EncodeStage(TaskConfig(image=str(given.photograph), condition_latent_frames=[0]))(context)
    return _first(context.state.get("x0_tokens_vision"))


def _first(latents: Tensor) -> Tensor:
    """The other frames are noise in the end, whatever they hold now."""
    return latents[:, :, :1]
