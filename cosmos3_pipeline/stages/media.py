"""Photographs and clips in, videos out. Imports no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.stages.files import whole_file
from cosmos3_pipeline.stages.likeness import Likeness, likeness

# With another number the same frames give other bytes.
X264_THREADS = 4


def read_image(path: str | Path) -> Image.Image:
    """The picture in `path` as RGB, the way up that its EXIF orientation says; of an animation the first frame.

    Raises:
        Refusal: no such file, or not a picture of 8 bits per channel.
    """
    file = _existing(path, key="task.image")
    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":
                raise Refusal(
                    what=f"{file} has more than 8 bits per pixel (mode {image.mode})",
                    why="its brightness cannot be turned into 0..255 without knowing its range",
                    works="the picture saved with 8 bits per channel",
                )
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise Refusal(
            what=f"task.image={path} is not a picture",
            why=str(error),
            works="a JPEG, PNG or WebP file; a video goes to task=v2v task.video=FILE",
        ) from error


def read_clip(path: str | Path, *, frames: int, keep: str) -> list[Image.Image]:
    """The `first` or `last` (`keep`) `frames` frames of a clip, as RGB, upright; no others are kept in memory.

    Frames are taken one by one as the file has them, whatever its frame rate, as diffusers takes them.

    Raises:
        Refusal: no such file, not a video, or a clip of fewer frames.
    """
    file = _existing(path, key="task.video")
    try:
        decoded = list(islice(_decode(file), frames)) if keep == "first" else _last_frames(file, frames)
        images = [_upright(frame) for frame in decoded]
    except FFmpegError as error:
        raise _no_video(file, str(error)) from error
    if not images:
        raise _no_video(file, "no frame of it can be decoded")
    if len(images) < frames:
        raise Refusal(
            what=f"task.video={path} has {len(images)} frame{'s' * (len(images) != 1)}, {frames} are needed",
            why="latent frame k shows the frames up to 4k; diffusers would repeat the last frame, a standstill",
            works=f"a longer clip, or latent frames up to {(len(images) - 1) // 4} in "
            "task.condition_latent_frames",
        )
    return images


def _existing(path: str | Path, *, key: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise Refusal(
            what=f"{key}={path} is not a file",
            why=f"{file.absolute()} {'is a folder' if file.is_dir() else 'does not exist'}",
            works="the path of a file that exists",
        )
    return file


def _no_video(file: Path, why: str) -> Refusal:
    return Refusal(
        what=f"{file} is not a video that can be read",
        why=why,
        works="a file such as MP4, MOV or WebM; a picture goes to task=i2v task.image=FILE",
    )


def _decode(file: Path, *, start: float | None = None) -> Iterator[Any]:
    """The frames of the first video stream from the key frame before `start` (seconds) on, or all of them."""
    with av.open(str(file)) as container:
        if not container.streams.video:
            raise _no_video(file, "there is no video stream in it")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        if start is not None:
            container.seek(int(start * av.time_base))
        yield from container.decode(stream)


def _last_frames(file: Path, frames: int) -> list[Any]:
    """The last frames, from as near to the end as the file's key frames allow."""
    with av.open(str(file)) as container:
        seconds = (container.duration or 0) / av.time_base
        rate = container.streams.video[0].average_rate if container.streams.video else None
    margin = 2 * frames / float(rate or 24)
    while margin < seconds:
        last = deque(_decode(file, start=seconds - margin), maxlen=frames)
        if len(last) == frames:
            return list(last)
        margin *= 4
    return list(deque(_decode(file), maxlen=frames))


def _upright(frame: Any) -> Image.Image:
    """A decoded frame as RGB; phones store the sensor's frames and beside them how to turn them."""
    return Image.fromarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


def frame_rate(fps: float) -> Fraction:
    """Frames per second as a file states them: 23.976, 29.97 and 59.94 mean 24000/1001, 30000/1001, 60000/1001."""
    ntsc = Fraction(round(fps * 1.001) * 1000, 1001)
    return ntsc if abs(ntsc - fps) < 1e-4 else Fraction(fps).limit_denominator(1001)


class VideoWriter:
    """Appends frames to an open H.264 stream; made by `write_video`."""

    def __init__(self, container: Any, stream: Any) -> None:
        self.num_frames = 0
        self._container = container
        self._stream = stream

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

    def finish(self) -> None:
        """Write the frames that the encoder still holds."""
        self._container.mux(self._stream.encode(None))


@contextmanager
def write_video(
    path: Path, *, height: int, width: int, fps: float, crf: int, preset: str
) -> Iterator[VideoWriter]:
    """An H.264 MP4 that browsers play, written frame by frame; it is there when the block ends without error.

    `crf` is x264's quality, 0 (lossless) to 51, and `preset` its speed. Colours are BT.709, as players assume
    for HD. The same frames give the same bytes.
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
        writer = VideoWriter(container, stream)
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
    for frame in _decode(file):
        yield frame.to_ndarray(format="rgb24")
