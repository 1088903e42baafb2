"""The video that is written, and how alike two files are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from numpy.typing import NDArray
from PIL import Image

from cosmos3_pipeline.stages.files import whole_file
from cosmos3_pipeline.stages.likeness import Likeness, likeness
from cosmos3_pipeline.stages.media.audio import AudioTrack

# With another number the same frames give other bytes.
X264_THREADS = 4


def frame_rate(fps: float) -> Fraction:
    """Frames per second as a file states them: 23.976, 29.97 and 59.94 mean 24000/1001, 30000/1001, 60000/1001."""
    ntsc = Fraction(round(fps * 1.001) * 1000, 1001)
    return ntsc if abs(ntsc - fps) < 1e-4 else Fraction(fps).limit_denominator(1001)


class VideoWriter:
    """Appends frames to an open H.264 stream; made by `write_video`."""

    def __init__(self, container: Any, stream: Any, audio: AudioTrack | None) -> None:
        self.num_frames = 0
        self._container = container
        self._stream = stream
        self._audio = audio

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Append `frames`, uint8 [frames, H, W, 3]."""
        assert frames.shape[1:] == (self._stream.height, self._stream.width, 3)
        for rgb in frames:
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(
                format="yuv420p",
                src_color_range=ColorRange.JPEG,
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                dst_color_primaries=ColorPrimaries.BT709,
                dst_color_trc=ColorTrc.BT709,
            )
            frame.pts, frame.time_base = self.num_frames, 1 / self._stream.codec_context.framerate
            self._container.mux(self._stream.encode(frame))
            self.num_frames += 1
            if self._audio is not None:
                self._audio.write_until(self.num_frames / self._stream.codec_context.framerate)

    def finish(self) -> None:
        """Write the frames, and the samples, that the encoders still hold."""
        self._container.mux(self._stream.encode(None))
        if self._audio is not None:
            self._audio.finish()


@contextmanager
def write_video(
    path: Path,
    *,
    height: int,
    width: int,
    fps: float,
    crf: int,
    preset: str,
    waveform: NDArray[np.float32] | None = None,
) -> Iterator[VideoWriter]:
    """An H.264 MP4 that browsers play, written frame by frame; it is there when the block ends without error.

    `crf` is x264's quality, 0 (lossless) to 51, and `preset` its speed. Colours are BT.709, as players assume
    for HD. The same frames give the same bytes. `waveform` [channels, samples], at 48 kHz, is its sound; it is
    written as the frames come, in AAC.
    """
    # The index goes in front of the frames, so that a browser starts before it has all of them.
    options = {"movflags": "+faststart"}
    with whole_file(path) as partial, av.open(str(partial), "w", format="mp4", options=options) as container:
        encoding = {"crf": str(crf), "preset": preset, "threads": str(X264_THREADS)}
        stream = container.add_stream("libx264", rate=frame_rate(fps), options=encoding)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        codec = stream.codec_context
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        audio = None if waveform is None else AudioTrack(container, waveform)
        writer = VideoWriter(container, stream, audio)
        yield writer
        writer.finish()


def likeness_of_files(reference: Path, other: Path) -> Likeness | None:
    """How alike two video or image files are; None when they differ in size or number of frames."""
    return likeness(_pixels(reference), _pixels(other))


def _pixels(file: Path) -> Iterator[NDArray[np.uint8]]:
    """The frames of a file, uint8 [H, W, 3]."""
    if file.suffix == ".png":
        with Image.open(file) as image:
            yield np.asarray(image.convert("RGB"))
        return
    with av.open(str(file)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")
