"""Frames to a file: a video written chunk by chunk, or an image; and the latents where they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from cosmos3_pipeline.config.schema import OutputConfig
from cosmos3_pipeline.stages.context import Picture, RunContext
from cosmos3_pipeline.stages.files import whole_file
from cosmos3_pipeline.stages.media import write_video

VIDEO_FILE = "video.mp4"
IMAGE_FILE = "image.png"
LATENTS_FILE = "latents.safetensors"


class ExportStage:
    """Reads `context.frames` to the end and writes them into `context.directory` on the root.

    `modality` is `video` (H.264 at quality `output.crf`, 0 to 51, with the x264 `output.preset`) or `image` (PNG).
    `output.latents` also writes the denoised latents, as tensor `latents` [1, C, T, h, w] in fp32.
    """

    def __init__(self, output: OutputConfig, *, modality: str) -> None:
        self._output = output
        self._modality = modality

    def __call__(self, context: RunContext) -> None:
        assert context.frames is not None
        if not context.is_root:
            for _ in context.frames:
                pass
            return
        sha256 = hashlib.sha256()
        frames = _hashed(context.frames, sha256)
        if self._modality == "image":
            path = context.directory / IMAGE_FILE
            num_frames = self._write_image(context, frames, path)
        else:
            path = context.directory / VIDEO_FILE
            num_frames = self._write_video(context, frames, path)
        assert num_frames == context.clip.num_frames
        if self._output.latents:
            with context.measure("export"), whole_file(context.directory / LATENTS_FILE) as partial:
                latents = context.state.get("latents").to("cpu", torch.float32).contiguous()
                save_file({"latents": latents}, partial)
        context.picture = Picture(path=path, num_frames=num_frames, frames_sha256=sha256.hexdigest())

    def _write_video(self, context: RunContext, frames: Iterator[Tensor], path: Path) -> int:
        output, size = self._output, {"height": context.clip.height, "width": context.clip.width}
        with write_video(path, fps=context.fps, crf=output.crf, preset=output.preset, **size) as writer:
            for chunk in frames:
                with context.measure("export"):
                    writer.write(chunk.numpy())
        return writer.num_frames

    def _write_image(self, context: RunContext, frames: Iterator[Tensor], path: Path) -> int:
        images = torch.cat(list(frames))
        with context.measure("export"), whole_file(path) as partial:
            Image.fromarray(images[0].numpy()).save(partial, format="PNG")
        return len(images)


def _hashed(chunks: Iterator[Tensor], sha256: hashlib._Hash) -> Iterator[Tensor]:
    """The chunks on the CPU, each added to `sha256` on its way."""
    for chunk in chunks:
        frames = chunk.cpu().contiguous()
        sha256.update(frames.numpy().data)
        yield frames
