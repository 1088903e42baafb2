"""The stages of a task with actions that differ from the stages of a video task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers import CosmosActionCondition
from diffusers.modular_pipelines.cosmos.after_decode import Cosmos3ActionOutputStep
from diffusers.modular_pipelines.cosmos.modular_blocks_cosmos3 import Cosmos3VisionActionCoreDenoiseStep
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, SequentialPipelineBlocks
from PIL import Image
from torch import Tensor

from cosmos3_pipeline.config.schema import Config, OutputConfig, SamplerConfig, TaskConfig
from cosmos3_pipeline.denoise.denoiser import ParallelLoopDenoiser
from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.planning.action_files import ACTIONS_FILE, actions_report, read_actions
from cosmos3_pipeline.planning.actions import ActionTask
from cosmos3_pipeline.planning.plan import Plan
from cosmos3_pipeline.planning.writing import Writing
from cosmos3_pipeline.stages.chunked import of_chunks
from cosmos3_pipeline.stages.context import RunContext, Stage
from cosmos3_pipeline.stages.denoise import DenoiseStage
from cosmos3_pipeline.stages.encode import lengthen
from cosmos3_pipeline.stages.export import ExportStage
from cosmos3_pipeline.stages.files import write_whole
from cosmos3_pipeline.stages.inputs import observation
from cosmos3_pipeline.stages.progress import Advance
from cosmos3_pipeline.stages.text import TextStage
from cosmos3_pipeline.stages.words import Words

HOST = torch.device("cpu")
HERE = Image.new("RGB", (1, 1))  # given to diffusers in place of the picture, which was encoded already


class ActionTextStage(TextStage):
    """As `TextStage`, with the caption on which the model was trained for actions: size, rate, length, view."""

    def __init__(self, task: TaskConfig, sampler: SamplerConfig, action: ActionTask) -> None:
        super().__init__(task, sampler)
        self._action = action

    def words(self, context: RunContext, prompt: str, negative: str | None) -> Words:
        """The caption in JSON. No sentences are appended to it or to the negative prompt."""
        assert self._action.canvas is not None
        height, width = self._action.canvas
        caption = context.components.pipeline._build_action_json_prompt(
            prompt,
            view_point=self._action.view_point,
            num_frames=context.clip.num_frames,
            fps=context.fps,
            height=height,
            width=width,
        )
        found = super().words(context, "", negative)
        return Words(caption, found.negative_prompt, found.negative_prompt_from, sentences=False)


class ActionEncodeStage:
    """Leaves `x0_tokens_vision`, `vision_condition_frames` and `action_condition_frame_indexes` in the state.

    The picture is padded to the canvas of its tier and encoded, and the padding is removed from the latents.
    `Cosmos3ActionVisionVaeEncoderStep` does the same, with two differences. Here the picture is scaled on the
    host, so that a large photograph takes no device memory. Only the conditioning frames are encoded (see
    `EncodeStage`).
    """

    def __init__(self, task: TaskConfig, action: ActionTask) -> None:
        self._task = task
        self._action = action

    @torch.no_grad()
    def __call__(self, context: RunContext) -> None:
        with context.measure("encode"):
            clip, action = context.clip, self._action
            conditioned = action.conditioned(clip.temporal)
            frames = conditioned[-1] * clip.temporal + 1
            pictures, key, context.inputs[key] = observation(self._task, frames, clip.temporal)
            vae, pipeline = context.components.vae(encoder=True), context.components.pipeline
            pixels, size, height, width = pipeline._prepare_action_video_conditioning(
                pictures, action.tier, frames, device=HOST, dtype=vae.dtype
            )
            latents = content_latents(context, pixels.to(context.components.device), size)
            if ((height, width), latents.shape[-2:]) != (action.canvas, (clip.latent_rows, clip.latent_cols)):
                raise Refusal(
                    what=f"{key} is another picture than when the run was planned",
                    why=f"it is {pictures[0].width}x{pictures[0].height} pixels now, which make another clip",
                    works="a file that stays as it is until the run has ended",
                )
            leave_latents(context, action, latents)


def content_latents(context: RunContext, pixels: Tensor, size: Tensor) -> Tensor:
    """The latents of pictures [1, 3, F, H, W] without padding. `size` is their size with padding and without."""
    pipeline = context.components.pipeline
    latents = pipeline._encode_video(pixels).contiguous().float()
    found: Tensor = pipeline._remove_action_video_padding_from_latent(latents, size)
    return found


def leave_latents(context: RunContext, action: ActionTask, latents: Tensor) -> None:
    """Leave the clip's condition in the state: `latents` of its first frames, and which actions are inputs."""
    state, clip = context.state, context.clip
    state.set("x0_tokens_vision", lengthen(latents, clip.latent_frames))
    state.set("vision_condition_frames", action.conditioned(clip.temporal))
    given = [] if action.predicts else list(range(action.chunk_size))
    state.set("action_condition_frame_indexes", given)


class ActionDenoiseStage(DenoiseStage):
    """As `DenoiseStage`. It also leaves `action_latents` [chunk_size, action_dim] in fp32.

    A clip may be made in several chunks. The stage then makes chunk number `chunk`, with the `denoiser` that all
    chunks share. Each chunk has different noise, because its seed is the seed of the previous chunk plus one.
    """

    def __init__(
        self,
        task: TaskConfig,
        sampler: SamplerConfig,
        action: ActionTask,
        *,
        chunk: int = 0,
        denoiser: ParallelLoopDenoiser | None = None,
        stays: bool = False,
    ) -> None:
        super().__init__(replace(sampler, seed=sampler.seed + chunk), stays=stays)
        self._task = task
        self._action = action
        self._chunk = chunk
        self._denoiser = denoiser

    def title(self, context: RunContext) -> str:
        """As `DenoiseStage.title`, with the number of the chunk."""
        return super().title(context) + ("" if context.chunks is None else of_chunks(self._chunk, context.chunks))

    def denoiser(self, context: RunContext, *, keep_texts: bool = False) -> ParallelLoopDenoiser:
        """The denoiser that the constructor was given, else as `DenoiseStage.denoiser`."""
        return self._denoiser or super().denoiser(context, keep_texts=keep_texts)

    def workflow(self, context: RunContext, advance: Advance) -> SequentialPipelineBlocks:
        """As `DenoiseStage.workflow`, with the action mask on the host: only the first step waits for its copy."""
        workflow = super().workflow(context, advance)
        workflow.sub_blocks["denoise"].sub_blocks.insert("mask", _HostMaskStep(), 0)
        return workflow

    def blocks(self, context: RunContext) -> SequentialPipelineBlocks:
        """diffusers' workflow of vision and actions."""
        action, raw_actions = self._action, None
        if not action.predicts:
            assert self._task.actions is not None
            rows = read_actions(self._task.actions, action, context.fps)
            if len(rows) + 1 != context.num_frames:
                raise Refusal(
                    what=f"task.actions={self._task.actions} is another file than when the run was planned",
                    why=f"it has {len(rows)} actions now, and {context.num_frames - 1} were planned",
                    works="a file that stays as it is until the run has ended",
                )
            own = rows[self._chunk * action.chunk_size :][: action.chunk_size]
            raw_actions = torch.tensor(own, dtype=torch.float32)
        # No block after the encoder reads the picture.
        source: dict[str, Any] = {"image": HERE} if action.shows else {"video": [HERE]}
        assert action.domain is not None
        condition = CosmosActionCondition(
            mode=action.mode.value,
            chunk_size=action.chunk_size,
            domain_name=action.domain,
            resolution_tier=action.tier,
            raw_actions=raw_actions,
            view_point=action.view_point,
            **source,
        )
        context.state.set("action", condition)
        return Cosmos3VisionActionCoreDenoiseStep()


class _HostMaskStep(ModularPipelineBlocks):  # type: ignore[misc] # diffusers is untyped
    """Keeps the action mask on the host, because diffusers asks in every step whether any action is noisy."""

    model_name = "cosmos3-omni"

    def __call__(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> tuple[Any, Any]:
        block_state.action_condition_mask = block_state.action_condition_mask.to(HOST)
        return components, block_state


class ActionExportStage(ExportStage):
    """Writes actions.json if the task predicts actions, and the files of `ExportStage` if it makes a video."""

    def __init__(self, output: OutputConfig, action: ActionTask, writing: Writing | None) -> None:
        super().__init__(output, modality="video", writing=writing)
        self._action = action

    def __call__(self, context: RunContext) -> None:
        if self._action.predicts and context.is_root:
            with context.measure("export"):
                path = context.directory / ACTIONS_FILE
                report = actions_report(self._action, context.fps, found_actions(context, self._action))
                write_whole(path, report)
                context.actions = path
        if context.frames is not None:
            super().__call__(context)
        elif context.is_root:
            self.write_latents(context)


def found_actions(context: RunContext, action: ActionTask) -> list[list[float]]:
    """The denoised actions, [chunk_size][action width of the domain]."""
    context.state.set("action_mode", action.mode.value)
    Cosmos3ActionOutputStep()(context.components.pipeline, context.state)
    (actions,) = context.state.get("action")
    rows: list[list[float]] = actions.tolist()
    return rows


def action_stages(action: ActionTask) -> dict[str, Callable[[Config, Plan], Stage]]:
    """The factories of the stages that a task with actions replaces, by stage name."""
    return {
        "text": lambda config, plan: ActionTextStage(config.task, config.sampler, action),
        "encode": lambda config, plan: ActionEncodeStage(config.task, action),
        "denoise": lambda config, plan: ActionDenoiseStage(
            config.task, config.sampler, action, stays=plan.weights.stays
        ),
        "export": lambda config, plan: ActionExportStage(config.output, action, plan.writing),
    }
