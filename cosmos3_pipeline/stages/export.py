"""Frames to a file: a video written chunk by chunk, or an image; and the latents where they are asked for."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from cosmos3_pipeline.config.schema import OutputConfig
from cosmos3_pipeline.stages.context import Picture, RunContext
from cosmos3_pipeline.stages.files import whole_file
from cosmos3_pipeline.stages.frame_queue import FrameQueue
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
        if self._modality == "image":
            path = context.directory / IMAGE_FILE
            self._write_image(context, path, sha256)
        else:
            path = context.directory / VIDEO_FILE
            self._write_video(context, path, sha256)
        self.write_latents(context)
        digest, num_frames = sha256.hexdigest(), context.clip.num_frames
        context.picture = Picture(path=path, num_frames=num_frames, frames_sha256=digest)

    def write_latents(self, context: RunContext) -> None:
        """Write the denoised latents where they are asked for."""
        if self._output.latents:
            with context.measure("export"), whole_file(context.directory / LATENTS_FILE) as partial:
                latents = context.state.get("latents").to("cpu", torch.float32).contiguous()
                save_file({"latents": latents}, partial)

    def _write_video(self, context: RunContext, path: Path, sha256: hashlib._Hash) -> None:
        output, size = self._output, {"height": context.clip.height, "width": context.clip.width}
        with write_video(path, fps=context.fps, crf=output.crf, preset=output.preset, **size) as writer:

            def write(frames: NDArray[np.uint8]) -> None:
                sha256.update(frames.data)
                writer.write(frames)

            with FrameQueue(write) as queue:
                assert context.frames is not None
                for chunk in context.frames:
                    # The device has the next portion to compute already, while this process waits for the last.
                    with context.measure("decode", portion=True):
                        queue.arrived()
                    with context.measure("export", portion=True):
                        queue.put(chunk)
                with context.measure("decode", portion=True):
                    queue.arrived()
                with context.measure("export"):
                    queue.finish()
        assert writer.num_frames == context.clip.num_frames

    def _write_image(self, context: RunContext, path: Path, sha256: hashlib._Hash) -> None:
        assert context.frames is not None
        (images,) = context.frames
        with context.measure("export"), whole_file(path) as partial:
            frames = images.cpu().contiguous().numpy()
            sha256.update(frames.data)
            Image.fromarray(frames[0]).save(partial, format="PNG")
