"""The condition to latents: photographs, or the frames of a clip that the video continues."""

from __future__ import annotations

import torch
from diffusers.modular_pipelines.cosmos.encoders import Cosmos3ImageVaeEncoderStep, Cosmos3VideoVaeEncoderStep
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from torch import Tensor

from cosmos3_pipeline.config.schema import TaskConfig
from cosmos3_pipeline.planning.geometry import clean_frames
from cosmos3_pipeline.stages.context import RunContext
from cosmos3_pipeline.stages.inputs import both_ends, condition_frames, photograph


class EncodeStage:
    """Leaves `x0_tokens_vision`, clean latents [1, C, T, h, w], and `vision_condition_frames` in the state.

    With neither `task.image` nor `task.video` (paths) it does nothing and the VAE's encoder is not loaded. A video
    gives the latent frames `task.condition_latent_frames`, from its first or last frames (`task.condition_keep`).
    With `task.last_image` two photographs give the first and the last latent frame.
    `context.inputs` gets the changes that reading made to the file's picture.

    diffusers encodes the whole length of the output, padded with copies of the last frame. Here only the frames up
    to the last conditioning latent frame are encoded. The latents are the same, because the encoder is causal:
    latent frame k sees frames up to 4k only. Later latent frames become noise, so they stay zero here.
    """

    def __init__(self, task: TaskConfig) -> None:
        self._task = task

    def __call__(self, context: RunContext) -> None:
        with context.measure("encode"):
            if self._task.last_image is not None:
                self._encode(context, "both ends")
            elif self._task.image is not None:
                self._encode(context, "image")
            elif self._task.video is not None:
                self._encode(context, "video")

    def _encode(self, context: RunContext, kind: str) -> None:
        clip = context.clip
        given = clean_frames(self._task.condition_latent_frames, clip.latent_frames)
        frames = max(given) * clip.temporal + 1
        inputs = PipelineState()
        inputs.set("height", clip.height)
        inputs.set("width", clip.width)
        # diffusers refuses one frame. From two frames the VAE makes one latent frame, which shows the first.
        inputs.set("num_frames", max(frames, 2))
        if kind == "image":
            block = Cosmos3ImageVaeEncoderStep()
            picture, context.inputs["task.image"] = photograph(self._task, clip)
            inputs.set("image", picture)
        else:
            block = Cosmos3VideoVaeEncoderStep()
            if kind == "both ends":
                # diffusers repeats the last picture to the end, so the last latent frame shows it without motion.
                pictures, changes = both_ends(self._task, clip)
                context.inputs |= changes
            else:
                pictures, context.inputs["task.video"] = condition_frames(self._task, clip)
            inputs.set("video", pictures)
            inputs.set("condition_frame_indexes_vision", given)
            inputs.set("condition_video_keep", "first")  # `condition_frames` took them from the right end
        context.components.vae(encoder=True)
        block(context.components.pipeline, inputs)
        context.state.set("x0_tokens_vision", lengthen(inputs.get("x0_tokens_vision"), clip.latent_frames))
        context.state.set("vision_condition_frames", inputs.get("vision_condition_frames"))


def lengthen(latents: Tensor, latent_frames: int) -> Tensor:
    """`latents` [1, C, n, h, w] with zero frames after them, [1, C, latent_frames, h, w]."""
    batch, channels, encoded, rows, cols = latents.shape
    missing = latents.new_zeros(batch, channels, latent_frames - encoded, rows, cols)
    return torch.cat([latents, missing], dim=2)
