"""A video that follows control clips, chunk after chunk: encode, denoise and decode take turns.

Packing, schedule, solver and guidance are diffusers' blocks of `Cosmos3TransferCoreDenoiseStep`. Its loop over
chunks is ours, because frames of one chunk leave while the next is made, and because other ranks need the frames
with which it begins.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack

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
from cosmos3_pipeline.distributed.mesh import REPLICA
from cosmos3_pipeline.planning.chunks import Chunks
from cosmos3_pipeline.stages.context import RunContext
from cosmos3_pipeline.stages.controls import ControlClip, first_frames
from cosmos3_pipeline.stages.decode import vae_latents
from cosmos3_pipeline.stages.denoise import ReportStep
from cosmos3_pipeline.stages.files import CONTROL_FILE
from cosmos3_pipeline.stages.media.writing import VideoWriter, write_video
from cosmos3_pipeline.vae.pixels import to_uint8

# Of a chunk, which nothing reads after it: tensors of the latents' size.
OF_A_CHUNK = (
    *("control_latents", "x0_tokens_vision", "condition_latents", "velocity", "velocity_mask"),
    *("cond_full_static", "cond_no_control_static", "uncond_full_static"),
    *("vision_tokens_full", "vision_tokens_target"),
)


class TransferStage:
    """Leaves `context.frames`, an iterator of uint8 frames [frames, H, W, 3]; all work happens as it is read.

    Every rank must read its own to the end: those that are not the root take part and get nothing.
    `output.control` writes the controls as the model was given them, `output.latents` keeps the latents of all
    chunks, which are in the state then, as [chunks, C, T, h, w].
    """

    def __init__(
        self, task: TaskConfig, sampler: SamplerConfig, output: OutputConfig, chunks: Chunks, *, stays: bool
    ) -> None:
        self._task = task
        self._sampler = sampler
        self._output = output
        self._chunks = chunks
        self._stays = stays

    def __call__(self, context: RunContext) -> None:
        context.frames = self._frames(context)

    def _frames(self, context: RunContext) -> Iterator[Tensor]:
        chunks, parts = self._chunks, context.components
        controls = [ControlClip(name, self._task, context.clip, chunks) for name in controls_of(self._task)]
        denoiser = ParallelTransferDenoiser(
            context.mesh,
            layers=parts.transformer(),
            texts=parts.texts,
            guidance_interval=self._sampler.guidance_interval,
            counts=context.passes,
        )
        with context.measure("denoise"):
            self._begin(context)
        seed, kept = None, []
        with ExitStack() as stack:
            writer = self._control_writer(context, stack, len(controls))
            for number in range(chunks.count):
                with context.measure("encode"):
                    pictures = [control.chunk(number) for control in controls]
                    if writer is not None:
                        _write_controls(writer, pictures, chunks.written(number))
                    self._encode(context, number, pictures, seed)
                    del pictures
                with context.measure("denoise"):
                    self._denoise(context, number, denoiser)
                if self._output.latents:
                    kept.append(context.state.get("latents").cpu())
                seed = yield from self._decode(context, number)
        context.inputs |= {control.key: control.changes for control in controls}
        if kept:
            context.state.set("latents", torch.cat(kept))

    def _begin(self, context: RunContext) -> None:
        """What all chunks share: the prompts' places in their sequences, and the generator of their noise."""
        state = context.state
        state.set("num_inference_steps", self._sampler.steps)
        state.set("guidance_scale", self._sampler.guidance_scale)
        state.set("control_guidance", self._task.control_guidance)
        state.set("generator", torch.Generator("cpu").manual_seed(self._sampler.seed))
        Cosmos3PrepareTextSegmentsStep()(context.components.pipeline, state)

    def _control_writer(self, context: RunContext, stack: ExitStack, controls: int) -> VideoWriter | None:
        """What writes the controls side by side, where they are asked for and this rank writes files."""
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

    def _encode(
        self, context: RunContext, number: int, pictures: Sequence[Sequence[Image.Image]], seed: Tensor | None
    ) -> None:
        """Leave the latents of the controls, and of the frames with which the chunk begins, in the state.

        The rest of the chunk is noise in the end. diffusers encodes all of it, filled with copies of the last of
        those frames; the encoder is causal, so the latents that are needed are the same without.
        """
        parts, clip, chunks = context.components, context.clip, self._chunks
        parts.vae(encoder=True)
        pipeline, clean = parts.pipeline, chunks.clean(number)
        if number == 0 and clean:
            given, context.inputs["task.video"] = first_frames(self._task, clip, clean)
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
        # As diffusers has them, in the transformer's dtype.
        dtype = pipeline.transformer.dtype
        controls = [pipeline._encode_video(_as_floats(context, control, dtype)).float() for control in pictures]
        context.state.set("control_latents", controls)
        context.state.set("x0_tokens_vision", latents)
        context.state.set("current_conditional_frames", clean)

    def _denoise(self, context: RunContext, number: int, denoiser: ParallelTransferDenoiser) -> None:
        """Leave the chunk's latents [1, C, T, h, w] in the state."""
        parts, state, of = context.components, context.state, _of_chunks(number, self._chunks)
        parts.scheduler()
        parts.load_vision()
        for block in (Cosmos3TransferPrepareLatentsStep(), Cosmos3TransferPackSequenceStep()):
            block(parts.pipeline, state)
        Cosmos3TransferSetTimestepsStep()(parts.pipeline, state)
        loop = Cosmos3TransferDenoiseStep()
        loop.set_progress_bar_config(disable=True)
        loop.sub_blocks["denoiser"] = denoiser
        with context.reporter.track(f"denoising steps{of}", self._sampler.steps) as advance:
            loop.sub_blocks["report"] = ReportStep(advance)
            loop(parts.pipeline, state)
        parts.scheduler().set_timesteps(1)  # forgets the steps before
        for name in OF_A_CHUNK:
            state.set(name, None)
        if not self._stays:
            parts.transformer().release()

    def _decode(self, context: RunContext, number: int) -> Generator[Tensor, None, Tensor | None]:
        """Yield the new frames of the chunk; returns those with which the next one begins, on every rank.

        They are [1, 3, frames, H, W] in the VAE's dtype, in [-1, 1], where its decoder clamps them.
        """
        chunks, clip = self._chunks, context.clip
        new, seeds = chunks.written(number), number + 1 < chunks.count and chunks.overlap > 0
        with context.measure("decode"):
            vae = context.components.vae(encoder=True)
            stream = iter(vae.decode_stream(vae_latents(context), pixels="float" if seeds else "uint8"))
            seed = None
            if seeds:
                shape = (1, 3, chunks.overlap, clip.height, clip.width)
                seed = torch.empty(shape, dtype=vae.dtype, device=context.components.device)
        at = 0
        with context.reporter.track(f"decoded frames{_of_chunks(number, chunks)}", clip.num_frames) as advance:
            while True:
                with context.measure("decode", portion=True), torch.no_grad():
                    portion = next(stream, None)
                    if portion is None:
                        break
                    if seed is not None:
                        count = portion.shape[1]
                        begin = max(chunks.stride - at, 0)
                        if begin < count:
                            first = at + begin - chunks.stride
                            seed[0, :, first : first + count - begin] = portion[:, begin:]
                        portion = to_uint8(portion[None])[0]
                    start, stop = max(new.start - at, 0), min(new.stop - at, len(portion))
                    at += len(portion)
                advance(len(portion))
                if start < stop:
                    yield portion[start:stop]
        if seed is not None:
            with context.measure("decode"):
                context.mesh.comm(REPLICA).broadcast(seed)
        return seed


def _of_chunks(number: int, chunks: Chunks) -> str:
    """Which chunk is worked on, for a person."""
    return f", chunk {number + 1} of {chunks.count}" if chunks.count > 1 else ""


def _as_floats(context: RunContext, pictures: Sequence[Image.Image], dtype: torch.dtype) -> Tensor:
    """Pictures in the size of the clip as diffusers takes them, [1, 3, F, H, W] in [-1, 1]."""
    processor, clip = context.components.pipeline.video_processor, context.clip
    video: Tensor = processor.preprocess_video(list(pictures), height=clip.height, width=clip.width)
    return video.to(device=context.components.device, dtype=dtype)


def _write_controls(writer: VideoWriter, pictures: Sequence[Sequence[Image.Image]], frames: range) -> None:
    """Append `frames` of all controls of a chunk, side by side."""
    for frame in frames:
        writer.write(np.concatenate([np.asarray(control[frame]) for control in pictures], axis=1)[None])
