"""Frames to a file: a video written chunk by chunk, or an image; and the latents, if the config asks for them."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from cosmos3_pipeline.config.schema import OutputConfig
from cosmos3_pipeline.planning.writing import Writing
from cosmos3_pipeline.stages.context import Picture, RunContext, Written
from cosmos3_pipeline.stages.files import IMAGE_FILE, LATENTS_FILE, SOUND_FILE, VIDEO_FILE, whole_file
from cosmos3_pipeline.stages.frame_queue import FrameQueue
from cosmos3_pipeline.stages.media import cut_to, frame_rate, sound_of, write_video, write_wav


class ExportStage:
    """Reads `context.frames` to the end and writes them into `context.directory` on the root.

    `modality` `image` makes a PNG, any other a video: H.264 at quality `output.crf`, 0 to 51, with
    `output.preset`. `writing` says how many encoders work at the same time; without it there is one.
    The sound of a video is `context.waveform`, cut to the length of the video because sound latents are whole
    frames of 1920 samples. `output.sound` also writes it to a WAV file, 16 bits a sample.
    `output.latents` also writes the denoised latents: tensor `latents` [1, C, T, h, w] in fp32, and with sound
    `sound_latents` [C, T].
    """

    def __init__(self, output: OutputConfig, *, modality: str, writing: Writing | None = None) -> None:
        self._output = output
        self._modality = modality
        self._encoders, self._parts = (1, 1) if writing is None else (writing.encoders, writing.parts)

    def __call__(self, context: RunContext) -> None:
        assert context.frames is not None
        if not context.is_root:
            for _ in context.frames:
                pass
            return
        sha256, waveform = hashlib.sha256(), self._waveform(context)
        written, frames = None, 1
        if self._modality == "image":
            path = context.directory / IMAGE_FILE
            self._write_image(context, path, sha256)
        else:
            path, frames = context.directory / VIDEO_FILE, context.num_frames
            written = self._write_video(context, path, sha256, waveform)
        self.write_latents(context)
        if self._output.sound and waveform is not None:
            with context.measure("export"):
                write_wav(context.directory / SOUND_FILE, waveform)
        context.picture = Picture(
            path=path,
            num_frames=frames,
            frames_sha256=sha256.hexdigest(),
            sound=None if waveform is None else sound_of(waveform),
            written=written,
        )

    def write_latents(self, context: RunContext) -> None:
        """Write the denoised latents, if `output.latents` asks for them."""
        if self._output.latents:
            with context.measure("export"), whole_file(context.directory / LATENTS_FILE) as partial:
                names = ("latents",) if context.waveform is None else ("latents", "sound_latents")
                found = {name: context.state.get(name).to("cpu", torch.float32).contiguous() for name in names}
                save_file(found, partial)

    def _waveform(self, context: RunContext) -> NDArray[np.float32] | None:
        """The sound [channels, samples] on the host, as long as the video."""
        if context.waveform is None:
            return None
        with context.measure("export"):
            waveform = context.waveform.to("cpu", torch.float32).numpy()
            return cut_to(waveform, context.clip.num_frames / frame_rate(context.fps))

    def _write_video(
        self,
        context: RunContext,
        path: Path,
        sha256: hashlib._Hash,
        waveform: NDArray[np.float32] | None,
    ) -> Written:
        """Write the frames as they come."""
        output = self._output
        with write_video(
            path,
            height=context.clip.height,
            width=context.clip.width,
            fps=context.fps,
            crf=output.crf,
            preset=output.preset,
            encoder=output.encoder,
            frames=context.num_frames,
            encoders=self._encoders,
            parts=self._parts,
            waveform=waveform,
        ) as writer:

            def write(frames: NDArray[np.uint8]) -> None:
                sha256.update(frames.data)
                writer.write(frames)

            with FrameQueue(write) as queue:
                assert context.frames is not None
                for chunk in context.frames:
                    # Wait for the previous portion. The device stays busy, because it has the next one to compute.
                    with context.measure("decode", portion=True):
                        queue.arrived()
                    with context.measure("export", portion=True):
                        queue.put(chunk)
                with context.measure("decode", portion=True):
                    queue.arrived()
                last = time.perf_counter()
                with context.measure("export"):
                    queue.finish()
            assert writer.num_frames == context.num_frames
            with context.measure("export"):
                writer.finish()
        return Written(
            encoders=self._encoders,
            parts=self._parts,
            encoder_seconds=writer.encoder_seconds,
            seconds_after_last_frame=time.perf_counter() - last,
        )

    def _write_image(self, context: RunContext, path: Path, sha256: hashlib._Hash) -> None:
        assert context.frames is not None
        (images,) = context.frames
        with context.measure("export"), whole_file(path) as partial:
            frames = images.cpu().contiguous().numpy()
            sha256.update(frames.data)
            Image.fromarray(frames[0]).save(partial, format="PNG")
