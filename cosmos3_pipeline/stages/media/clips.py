"""Reads the frames of a clip as a player shows them: upright, in BT.709, square pixels, at the requested rate."""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from math import ceil
from pathlib import Path
from typing import Any, cast

import av
from av.error import FFmpegError
from av.stream import Disposition
from PIL import Image

from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.stages.media.frames import picture_of
from cosmos3_pipeline.stages.media.shown import RGB, WHITE, Change, cut_off, existing, filling

# No other formats are opened, because playlists and lists of files read other files, and a picture is no clip.
FORMATS = {
    **{"mov": "MP4 and MOV", "matroska": "WebM and MKV", "avi": "AVI", "mpegts": "TS", "mpeg": "MPEG"},
    **{"ogg": "Ogg", "asf": "WMV", "flv": "FLV", "gif": "GIF", "apng": "APNG", "mxf": "MXF", "dv": "DV"},
    **{"yuv4mpegpipe": "Y4M", "ivf": "IVF", "h264": "H.264", "hevc": "HEVC", "obu": "AV1"},
    **{"mpegvideo": "MPEG video", "m4v": "M4V"},
}
MOST_PIXELS = 1 << 27  # of a frame: 16K. A header that claims more is not trusted with that much memory.
READING = {
    "format_whitelist": ",".join(FORMATS),
    "protocol_whitelist": "file",
    "max_pixels": str(MOST_PIXELS),
}
MISSING_FRAMES = 2  # a file whose header promises more frames after its last one is told to be cut off
TIE = 1e-6  # seconds: if two frames are equally near to a moment, the earlier frame is taken
# Packets of these formats say when a frame is decoded, not when it is shown.
WITHOUT_TIMES = ("avi", "h264", "hevc", "m4v", "mpegvideo", "obu")
# Decoders for the transparency that WebM keeps beside the frames. FFmpeg's own decoders ignore it.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


@dataclass(frozen=True)
class _Timed:
    """Decoded frame number `number`. A player shows it at `time` for `lasts`, both in seconds."""

    number: int
    time: float
    lasts: float
    frame: Any


@dataclass(frozen=True)
class _Source:
    """Properties of the frames of a file, as the file states them.

    ends: the end of the last frame, in seconds. rate: frames per second on average. timed: the packets say when
    frames are shown. counted_rate: frames per second of a file without such times. pixel: width over height of a
    stored pixel. missing: what the user is told about a file that ends before its header says, or None.
    """

    file: Path
    key: str
    ends: float
    rate: float
    counted_rate: float
    pixel: Fraction
    timed: bool
    missing: Change | None


def read_frames(
    path: str | Path,
    *,
    frames: int,
    keep: str = "first",
    fps: float | None = None,
    size: tuple[int, int] | None = None,
    background: RGB = WHITE,
    key: str = "task.video",
    fewer: Callable[[int], str | None] = lambda found: None,
) -> tuple[list[Image.Image], list[Change]]:
    """The `first` or `last` (`keep`) `frames` frames of a clip as RGB pictures, and the changes made to them.

    With `fps` the frames are chosen by their time stamps, at moments 1/fps seconds apart. Without `fps` they are
    consecutive frames of the file, at any rate. With `size`, width and height in pixels, each is scaled and
    cropped to fill that size. No other frames are kept in memory. A refusal names `key`, and the setting that
    `fewer` gives for the number of frames that were found; None if no setting takes so few.

    Raises:
        Refusal: no such file, not a video, colours that cannot be converted, or a clip of fewer frames.
    """
    file = existing(path, key=key)
    pictures, numbers, changes = list[Image.Image](), list[int](), dict[str, Change]()
    try:
        source = _source(file, key)
        for timed in _taken(source, frames, keep, fps):
            picture, found = _filled(timed.frame, source, size, background)
            pictures.append(picture)
            numbers.append(timed.number)
            changes |= {change.kind: change for change in found}
    except FFmpegError as error:
        raise _no_video(file, key, _reason(error)) from error
    if not pictures:
        raise _no_video(file, key, "no frame of it can be decoded")
    if len(pictures) < frames:
        raise _too_short(source, len(pictures), frames, fps, fewer(len(pictures)))
    if fps is not None and numbers != list(range(numbers[0], numbers[0] + frames)):
        changes["rate"] = _other_rate(source, fps)
    if keep == "last" and source.missing is not None:
        changes["missing"] = source.missing
    return pictures, list(changes.values())


def each_frame(
    path: str | Path,
    *,
    fps: float | None,
    size: tuple[int, int],
    background: RGB = WHITE,
    key: str = "task.video",
) -> Iterator[tuple[Image.Image, list[Change]]]:
    """The frames of a clip one after the other, see `read_frames`, each with the changes made to it.

    Raises:
        Refusal: as `read_frames`, except that a clip may have any length.
    """
    file = existing(path, key=key)
    try:
        source = _source(file, key)
        timed, before = _decode(source), None
        for one in timed if fps is None else _shown_every(1 / fps, timed):
            picture, changes = _filled(one.frame, source, size, background)
            if fps is not None and before is not None and one.number != before + 1:
                changes.append(_other_rate(source, fps))
            if before is None and source.missing is not None:
                changes.append(source.missing)
            before = one.number
            yield picture, changes
    except FFmpegError as error:
        raise _no_video(file, key, _reason(error)) from error


@dataclass(frozen=True)
class Look:
    """The number of frames that a clip shows, and their width over their height."""

    frames: int
    aspect: Fraction


def look_at(path: str | Path, *, fps: float | None, key: str = "task.video") -> Look:
    """The number and shape of the frames that `each_frame` yields. One frame is decoded; packets are counted.

    Raises:
        Refusal: no such file, not a video, or colours that cannot be converted.
    """
    file = existing(path, key=key)
    try:
        source = _source(file, key)
        first = next(_decode(source), None)
        if first is None:
            raise _no_video(file, key, "no frame of it can be decoded")
        picture, pixel, _ = picture_of(first.frame, pixel=source.pixel, background=WHITE, key=key)
        times = sorted(_packet_times(source))
    except FFmpegError as error:
        raise _no_video(file, key, _reason(error)) from error
    aspect = Fraction(picture.width, picture.height) * pixel
    if fps is None:
        return Look(len(times), aspect)
    timed = (_Timed(number, time, lasts, None) for number, (time, lasts) in enumerate(times))
    return Look(sum(1 for _ in _shown_every(1 / fps, timed)), aspect)


def _packet_times(source: _Source) -> Iterator[tuple[float, float]]:
    """For each frame, when it is shown and for how long, in seconds, as its packet says."""
    with av.open(str(source.file), options=READING) as container:
        number = 0
        for packet in container.demux(_stream(container, source.file, source.key)):
            if packet.size == 0 or packet.is_discard:
                continue
            if source.timed and packet.pts is not None:
                yield float(packet.pts * packet.time_base), float((packet.duration or 0) * packet.time_base)
            else:
                yield number / source.counted_rate, 1 / source.counted_rate
            number += 1


def _taken(source: _Source, frames: int, keep: str, fps: float | None) -> Iterator[_Timed]:
    if fps is None:
        return islice(_decode(source), frames) if keep == "first" else iter(_tail(source, frames))
    if keep == "first":
        return _shown_every(1 / fps, _decode(source), frames)
    return _shown_last(1 / fps, source, frames)


def _filled(
    frame: Any, source: _Source, size: tuple[int, int] | None, background: RGB
) -> tuple[Image.Image, list[Change]]:
    picture, pixel, changes = picture_of(frame, pixel=source.pixel, background=background, key=source.key)
    if pixel != 1:
        changes.append(Change("pixels", f"its pixels are {float(source.pixel):.4g} times as wide as high"))
    if size is None:
        width, height = picture.size
        square = (round(width * pixel), height) if pixel > 1 else (width, round(height / pixel))
        return picture if pixel == 1 else picture.resize(square, Image.Resampling.BILINEAR), changes
    if cropped := cut_off(picture.size, size, pixel):
        changes.append(cropped)
    return filling(picture, size, pixel), changes


def _other_rate(source: _Source, fps: float) -> Change:
    """The note that tells the user: frames of the clip are skipped or repeated to reach `fps`."""
    uneven = f"{source.rate:.4g}" == f"{fps:.4g}"
    has = "its frames are not evenly spaced" if uneven else f"it has {source.rate:.4g} per second"
    return Change("rate", f"{has}, and {fps:g} frames per second are taken by their time stamps")


def _source(file: Path, key: str) -> _Source:
    with av.open(str(file), options=READING) as container:
        stream = _stream(container, file, key)
        rate = float(stream.average_rate or stream.guessed_rate or 24)
        begins = (container.start_time or 0) / av.time_base
        ends = begins + (container.duration or 0) / av.time_base
        counted_rate = float(stream.guessed_rate or rate)
        timed = container.format.name not in WITHOUT_TIMES
        stated = _stated_end(stream) if timed else stream.frames / counted_rate  # zero if the header has no count
        readable = _last_packet_ends(container, stream, stated) if timed and stated else ends
        return _Source(
            file=file,
            key=key,
            ends=ends,
            rate=rate,
            counted_rate=counted_rate,
            pixel=stream.sample_aspect_ratio or Fraction(1),
            timed=timed,
            missing=_missing(readable, stated) if stated - readable > MISSING_FRAMES / rate else None,
        )


def _stated_end(stream: Any) -> float:
    """When the last frame of the stream ends by the header of the file, in seconds; 0 if it does not say so."""
    if stream.duration is not None:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    duration = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))  # MKV and WebM
    return 3600 * int(duration[1]) + 60 * int(duration[2]) + float(duration[3]) if duration else 0.0


def _last_packet_ends(container: Any, stream: Any, stated: float) -> float:
    """When the last frame in the file ends, in seconds. Reads the whole file only if its end is missing."""
    ends = 0.0
    for start in (stated, 0.0):
        with suppress(FFmpegError):  # decoding tells what is wrong with the file
            container.seek(int(start * av.time_base))
            for packet in container.demux(stream):
                if packet.size and packet.pts is not None:
                    ends = max(ends, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if ends:
            break
    return ends


def _missing(readable: float, stated: float) -> Change:
    return Change("missing", f"its end is missing: its header says {stated:.2f} s, and {readable:.2f} s are there")


def _stream(container: Any, file: Path, key: str) -> Any:
    stream = container.streams.best("video")
    if stream is None or stream.disposition & Disposition.attached_pic:  # the cover of a piece of music
        raise _no_video(file, key, "there is no video stream in it")
    return stream


def _decode(source: _Source, *, start: float | None = None) -> Iterator[_Timed]:
    """The frames of the file, from the key frame before `start` (seconds) on. None: from the first frame on."""
    with av.open(str(source.file), options=READING) as container:
        stream = _stream(container, source.file, source.key)
        stream.thread_type = "AUTO"
        decode = _decoder(stream, source)
        if start is not None:
            container.seek(int(start * av.time_base))
        frames = (frame for packet in container.demux(stream) for frame in decode(packet))
        for number, frame in enumerate(frames):
            if source.timed and frame.time is not None:
                yield _Timed(number, frame.time, float((frame.duration or 0) * frame.time_base), frame)
            else:
                yield _Timed(number, number / source.counted_rate, 1 / source.counted_rate, frame)


def _decoder(stream: Any, source: _Source) -> Callable[[Any], list[Any]]:
    """The function that decodes the packets of `stream` to frames, with their transparency if they have any."""
    name = ALPHA_DECODERS.get(stream.codec_context.name)
    if name is None or stream.metadata.get("alpha_mode") != "1":
        return cast(Callable[[Any], list[Any]], stream.decode)
    if name not in av.codecs_available:
        raise Refusal(
            what=f"{source.key}={source.file} is transparent in places",
            why=f"this build of FFmpeg has no {name}, and its other decoders drop the transparency",
            works="the clip without transparency",
        )
    return cast(Callable[[Any], list[Any]], av.CodecContext.create(name, "r").decode)


def _tail(source: _Source, frames: int) -> list[_Timed]:
    """The last frames. Decoding starts as near to the end as the file's key frames allow."""
    margin = 2 * frames / source.rate
    while source.timed and margin < source.ends:
        last = deque(_decode(source, start=source.ends - margin), maxlen=frames)
        if len(last) == frames:
            return list(last)
        margin *= 4
    return list(deque(_decode(source), maxlen=frames))


def _shown_last(step: float, source: _Source, frames: int) -> Iterator[_Timed]:
    """As `_shown_every`, but the last moment is the last frame of the file."""
    last = _tail(source, 1)
    begin = last[0].time - (frames - 1) * step if last else 0.0
    starts = [begin - step] if source.timed and begin > step else []
    for start in (*starts, None):
        timed = _decode(source, start=start)
        first = next(timed, None)
        if first is not None and (start is None or first.time <= begin):
            missing = max(ceil((first.time - begin) / step - 1 / 4), 0)
            return _shown_every(step, chain([first], timed), frames - missing, begin=begin + missing * step)
    return iter(())


def _shown_every(
    step: float, timed: Iterator[_Timed], frames: int | None = None, *, begin: float | None = None
) -> Iterator[_Timed]:
    """The frames that are shown at `begin`, `step` seconds later and so on.

    `begin` None starts at the time of the first frame. `frames` None goes to the end of the clip.

    For each moment the nearest frame is taken, because time stamps are rounded and cameras keep no even pace. No
    frame is taken more than half a step before its time, even if the previous frame is shown for long.
    """
    now = next(timed, None)
    if now is None:
        return
    following = next(timed, None)
    begin = now.time if begin is None else begin
    for count in range(frames) if frames is not None else itertools.count():
        moment = begin + count * step
        while following is not None and following.time - moment < min(step / 2, moment - now.time) - TIE:
            now, following = following, next(timed, None)
        # The last frame is shown for its own duration and is not repeated after it.
        if following is None and moment - now.time > max(now.lasts - step / 4, step / 4):
            return
        yield now


def _reason(error: FFmpegError) -> str:
    if isinstance(error, av.error.ArgumentError):  # FFmpeg's error for a format outside of the list
        return f"it is none of {', '.join(FORMATS.values())}"
    if isinstance(error, av.error.InvalidDataError):
        return "it is damaged, cut off, or no video: FFmpeg finds invalid data in it"
    return str(error)


def _no_video(file: Path, key: str, why: str) -> Refusal:
    return Refusal(
        what=f"{key}={file} is not a video that can be read",
        why=why,
        works="a file such as MP4, MOV or WebM; a picture goes to task=i2v task.image=FILE",
    )


def _too_short(source: _Source, found: int, frames: int, fps: float | None, fewer: str | None) -> Refusal:
    at = "" if fps is None else f" at {fps:g} frames per second"
    return Refusal(
        what=f"{source.key}={source.file} has {found} frame{'s' * (found != 1)}{at}, {frames} are needed",
        why="latent frame k shows the frames up to 4k; diffusers would repeat the last frame, a standstill"
        + (f"; {source.missing.said}" if source.missing is not None else ""),
        works="a longer clip" + (f", or {fewer}" if fewer else ""),
    )
