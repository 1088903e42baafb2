"""Writing a video, and comparing two video or image files."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from functools import cache
from pathlib import Path
from queue import Queue
from typing import Any

import av
import numpy as np
from av.codec.context import Flags
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from numpy.typing import NDArray
from PIL import Image

from cosmos3_pipeline.config.schema import Encoder
from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.planning.writing import LOOKAHEAD, X264_THREADS
from cosmos3_pipeline.stages.files import whole_file
from cosmos3_pipeline.stages.likeness import Likeness, likeness
from cosmos3_pipeline.stages.media.audio import AudioTrack

# How many frames of a part may wait for its encoder.
WAITING = 48
COLOUR = ("colorspace", "color_range", "color_primaries", "color_trc")


def frame_rate(fps: float) -> Fraction:
    """Frames per second as a file states them: 23.976, 29.97 and 59.94 mean 24000/1001, 30000/1001, 60000/1001."""
    ntsc = Fraction(round(fps * 1.001) * 1000, 1001)
    return ntsc if abs(ntsc - fps) < 1e-4 else Fraction(fps).limit_denominator(1001)


def options_of(encoder: Encoder, *, crf: int, preset: str) -> dict[str, str]:
    """The options for libav's `encoder`: `crf` is x264's quality, 0 (lossless) to 51, and `preset` its speed."""
    if encoder is Encoder.libx264:
        found = {"crf": str(crf), "preset": preset, "threads": str(X264_THREADS), "rc-lookahead": str(LOOKAHEAD)}
        # With AVX-512, x264 made different bytes from the same frames in each run (five of five runs at 96 x 160).
        return {**found, "x264-params": "asm=avx2"} if _has_avx512() else found
    return {"rc": "constqp", "qp": str(crf), "preset": preset}


@cache
def _has_avx512() -> bool:
    try:
        return "avx512f" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False


def check_encoder(encoder: Encoder) -> None:
    """Raise Refusal if this machine has no such encoder."""
    codec: Any = av.CodecContext.create(encoder.value, "w")
    codec.width, codec.height, codec.pix_fmt = 256, 256, "yuv420p"
    codec.framerate, codec.time_base = Fraction(24), Fraction(1, 24)
    try:
        codec.open()
    except (av.FFmpegError, OSError, ValueError) as error:
        raise Refusal(
            what=f"output.encoder={encoder.value}",
            why=f"it does not open on this machine: {error}. H100, H200 and B200 have no encoder of their own",
            works=f"output.encoder={Encoder.libx264.value}",
        ) from error


class _Part:
    """A part of the video with its own encoder. Its first frame refers to no frame of an earlier part."""

    def __init__(self, codec: Any) -> None:
        self.seconds = 0.0
        self.dropped = False
        self._codec = codec
        self._frames: Queue[av.VideoFrame | None] = Queue(WAITING)

    def put(self, frame: av.VideoFrame | None) -> None:
        """Append a frame; None ends the part. Waits while the encoder is far behind."""
        self._frames.put(frame)

    def packets(self) -> list[av.Packet]:
        """Encode all frames as they come."""
        found: list[av.Packet] = []
        error: BaseException | None = None
        while True:
            frame = self._frames.get()
            if error is None and not self.dropped:
                begun = time.perf_counter()
                try:
                    found += self._codec.encode(frame)
                except BaseException as raised:
                    # Raise the error at the end only, because `put` waits until this loop takes the next frames.
                    error = raised
                self.seconds += time.perf_counter() - begun
            if frame is None:
                if error is not None:
                    raise error
                return found


class VideoWriter:
    """Appends frames to an open H.264 stream; made by `write_video`.

    The frames are encoded in parts, several at a time. The packets of the parts follow each other in the stream.
    """

    def __init__(
        self,
        container: Any,
        stream: Any,
        audio: AudioTrack | None,
        options: Mapping[str, str],
        ends: Sequence[int],
        encoders: int,
    ) -> None:
        self.num_frames = 0
        self._container = container
        self._stream = stream
        self._audio = audio
        self._options = options  # for the encoder of each part
        self._ends = ends  # numbers of the frames at which the next part begins
        self._pool = ThreadPoolExecutor(encoders, thread_name_prefix="encoder")
        self._parts: list[_Part] = []
        self._finished = False
        self._ended = 0  # number of parts whose last frame has come
        self._packets: list[Future[list[av.Packet]]] = []

    @property
    def encoder_seconds(self) -> float:
        """The seconds in which encoders worked, or waited for each other's threads, added up over the encoders."""
        return sum(part.seconds for part in self._parts)

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
            if not self._parts or self.num_frames in self._ends:
                self._begin_part()
            self._parts[-1].put(frame)
            self.num_frames += 1

    def finish(self) -> None:
        """Write the frames and the samples that the encoders still hold. A second call does nothing."""
        if self._finished:
            return
        self._finished = True
        self._end_part()
        for packets in self._packets:
            self._mux(packets.result())
        if self._audio is not None:
            self._audio.write_until(self.num_frames / self._stream.codec_context.framerate)
            self._audio.finish()

    def close(self) -> None:
        """End the encoders, even if some frames have not come."""
        for part in self._parts:
            part.dropped = True
        self._end_part()
        self._pool.shutdown()

    def _begin_part(self) -> None:
        self._end_part()
        own, codec = self._stream.codec_context, av.CodecContext.create(self._stream.codec_context.codec, "w")
        for name in ("width", "height", "pix_fmt", "framerate", *COLOUR):
            setattr(codec, name, getattr(own, name))
        codec.time_base, codec.bit_rate, codec.options = 1 / own.framerate, 0, dict(self._options)
        codec.flags |= Flags.global_header
        part = _Part(codec)
        self._parts.append(part)
        self._packets.append(self._pool.submit(part.packets))

    def _end_part(self) -> None:
        if len(self._parts) > self._ended:
            self._parts[-1].put(None)
            self._ended = len(self._parts)

    def _mux(self, packets: list[av.Packet]) -> None:
        for packet in packets:
            packet.stream = self._stream
            seconds = packet.pts * packet.time_base
            self._container.mux(packet)
            if self._audio is not None:
                self._audio.write_until(seconds)


@contextmanager
def write_video(
    path: Path,
    *,
    height: int,
    width: int,
    fps: float,
    crf: int,
    preset: str,
    encoder: Encoder = Encoder.libx264,
    frames: int = 0,
    encoders: int = 1,
    parts: int = 1,
    waveform: NDArray[np.float32] | None = None,
) -> Iterator[VideoWriter]:
    """An H.264 MP4 that browsers play, written frame by frame. The file exists after the block ends without error.

    Its `frames` are cut in `parts`, and `encoders` of the parts are encoded at the same time. More than one part
    needs the number of `frames`. The same frames in the same number of parts give the same bytes. `crf` is x264's
    quality, 0 (lossless) to 51, and `preset` its speed. Colours are BT.709, as players assume for HD.
    `waveform` [channels, samples] at 48 kHz is the sound of the video. It is written as AAC.
    """
    # The index goes in front of the frames, so that a browser starts to play before it has all frames.
    options = {"movflags": "+faststart"}
    with whole_file(path) as partial, av.open(str(partial), "w", format="mp4", options=options) as container:
        # The encoder of the stream makes only the header, which all parts share. It encodes no frame.
        how = options_of(encoder, crf=crf, preset=preset)
        stream = container.add_stream(encoder.value, rate=frame_rate(fps), options=dict(how))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        codec = stream.codec_context
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        audio = None if waveform is None else AudioTrack(container, waveform)
        container.start_encoding()
        ends = [round(part * frames / parts) for part in range(1, parts)]
        writer = VideoWriter(container, stream, audio, how, ends, encoders)
        try:
            yield writer
            writer.finish()
        finally:
            writer.close()


def likeness_of_files(reference: Path, other: Path) -> Likeness | None:
    """How alike two video or image files are. None if they differ in size or number of frames."""
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
