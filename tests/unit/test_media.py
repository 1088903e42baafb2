"""Photographs and clips as people have them, and the video that is written."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from toy_runs import clip_of, task_config

from cosmos3_pipeline.config.schema import Encoder
from cosmos3_pipeline.config.shortcut import composition_of
from cosmos3_pipeline.errors import ConfigError, Refusal
from cosmos3_pipeline.jobs.start import prepare
from cosmos3_pipeline.planning.writing import IN_FLIGHT, LOOKAHEAD
from cosmos3_pipeline.stages.files import whole_file
from cosmos3_pipeline.stages.inputs import condition_frames
from cosmos3_pipeline.stages.likeness import PEAK, psnr_db
from cosmos3_pipeline.stages.media import (
    check_encoder,
    clips,
    frame_rate,
    likeness_of_files,
    read_frames,
    read_picture,
    write_video,
    writing,
)


def pictures(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Moving smooth pictures, uint8 [count, H, W, 3]; each tells its number by its brightness."""
    rows, cols = np.mgrid[0:height, 0:width]
    frames = [
        np.stack([np.sin((rows + 3 * i) / 9), np.cos((cols - 2 * i) / 7), np.sin((rows + cols) / 11)], -1) * 30
        + 50
        + 120 * i / count
        for i in range(count)
    ]
    return np.stack(frames).astype(np.uint8)


def write(path: Path, frames: np.ndarray, *, fps: float = 24.0, crf: int = 10, chunk: int = 4, **how: Any) -> Path:
    size = {"height": frames.shape[1], "width": frames.shape[2]}
    with write_video(path, fps=fps, crf=crf, preset="fast", frames=len(frames), **size, **how) as writer:
        for start in range(0, len(frames), chunk):
            writer.write(frames[start : start + chunk])
    return path


def write_with(
    path: Path, frames: np.ndarray, codec: str, *, gop: int, pix_fmt: str = "yuv420p", **options: str
) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(30000, 1001), options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.codec_context.gop_size = gop
        for rgb in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def frames_of(path: Path, *, frames: int, **how: Any) -> np.ndarray:
    """The frames that are read, uint8 [frames, H, W, 3]."""
    return np.stack([np.asarray(picture) for picture in read_frames(path, frames=frames, **how)[0]])


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("fps", [10, 16, 24, 29.97, 30], ids=str)
def test_a_video_comes_back_as_written(fps: float, tmp_path: Path) -> None:
    frames = pictures(9)
    path = write(tmp_path / "video.mp4", frames, fps=fps)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == frame_rate(fps) and stream.frames == 9
        assert float(stream.duration * stream.time_base) == pytest.approx(9 / fps, rel=1e-3)
        pts = [frame.time for frame in container.decode(stream)]
        assert np.allclose(np.diff(pts), 1 / fps, atol=1e-3)
    same = likeness_of_files(path, path)
    assert same is not None and same.identical and same.psnr_db is None
    back = decoded(path)
    assert back.shape == frames.shape
    assert psnr_db(PEAK, np.square(back.astype(float) - frames).mean()) > 35
    data = path.read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")  # starts to play before it is whole


def test_colours_come_back_and_are_named(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 64, 200)]
    frames = np.stack([np.full((32, 32, 3), colour, dtype=np.uint8) for colour in colours])
    path = write(tmp_path / "video.mp4", frames, crf=1)
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.colorspace, codec.color_range, codec.color_primaries, codec.color_trc) == (1, 1, 1, 1)
    assert np.abs(decoded(path).astype(int) - frames).max() <= 4


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    frames = pictures(13, 96, 160)
    files = [write(tmp_path / f"{chunk}.mp4", frames, chunk=chunk) for chunk in (1, 4, 13)]
    assert len({hashlib.sha256(f.read_bytes()).hexdigest() for f in files}) == 1
    assert write(tmp_path / "other.mp4", frames[::-1]).read_bytes() != files[0].read_bytes()


@pytest.mark.parametrize(("count", "parts", "encoders"), [(61, 3, 2), (7, 7, 3), (24, 2, 4), (100, 1, 1)])
def test_parts_of_several_encoders_are_one_video(count: int, parts: int, encoders: int, tmp_path: Path) -> None:
    frames = pictures(count)
    one = write(tmp_path / "one.mp4", frames)
    path = write(tmp_path / "parts.mp4", frames, parts=parts, encoders=encoders, chunk=5)
    assert (
        path.read_bytes() == write(tmp_path / "again.mp4", frames, parts=parts, encoders=1, chunk=3).read_bytes()
    )
    with av.open(str(path)) as container, av.open(str(one)) as other:
        assert container.streams.video[0].duration == other.streams.video[0].duration
        packets = [packet for packet in container.demux(video=0) if packet.size]
        assert [packet.dts for packet in packets] == sorted({packet.dts for packet in packets})
        assert sum(packet.is_keyframe for packet in packets) >= parts
    made = decoded(path).astype(int)
    assert made.shape == frames.shape
    # As near to the frames as the video of one encoder.
    assert np.abs(made - frames).mean() <= 1.1 * np.abs(decoded(one).astype(int) - frames).mean()


def test_few_frames_are_left_when_the_last_has_come() -> None:
    """The longer an encoder looks ahead, the later the file is there: with the preset's own options 52 frames."""
    codec: Any = av.CodecContext.create("libx264", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = 64, 48, "yuv420p", Fraction(1, 24)
    codec.options = writing.options_of(Encoder.libx264, crf=17, preset="medium")
    frames = [av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="yuv420p") for rgb in pictures(80)]
    for number, frame in enumerate(frames):
        frame.pts = number
    assert 80 - sum(len(codec.encode(frame)) for frame in frames) <= LOOKAHEAD + IN_FLIGHT


def test_an_encoder_that_fails_ends_the_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(part: Any) -> list[Any]:
        part._codec = SimpleNamespace(encode=lambda frame: 1 / 0)
        return packets(part)

    packets = writing._Part.packets
    monkeypatch.setattr(writing._Part, "packets", fails)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "video.mp4", pictures(120), parts=2, encoders=2)
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_the_machine_lacks_is_refused() -> None:
    check_encoder(Encoder.libx264)
    with pytest.raises(Refusal, match="it does not open on this machine") as raised:
        check_encoder(Encoder.h264_nvenc)
    assert raised.value.problem.works == "output.encoder=libx264"
    asked = ("model=toy_random", "output.encoder=h264_nvenc")
    with pytest.raises(ConfigError, match="h264_nvenc"):  # before a folder is made
        prepare(composition_of(asked))
    with pytest.raises(ConfigError, match="it is for the file of a video"):
        prepare(composition_of((*asked, "task=t2i")))


def test_quality_and_preset_are_heard(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (5, 48, 64, 3), dtype=np.uint8)
    sizes = [write(tmp_path / f"{crf}.mp4", frames, crf=crf).stat().st_size for crf in (5, 20, 40)]
    assert sizes[0] > 1.2 * sizes[1] > 1.44 * sizes[2]


def test_a_video_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"an older video")
    with (
        pytest.raises(RuntimeError),
        write_video(path, height=48, width=64, fps=24, crf=17, preset="ultrafast") as w,
    ):
        w.write(pictures(100))
        (partial,) = [p for p in tmp_path.iterdir() if p != path]
        assert partial.match("video.mp4.*.partial")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["video.mp4"] and path.read_bytes() == b"an older video"


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a.txt") as partial:
        partial.write_text("x")
        assert not (tmp_path / "a.txt").exists()
    assert (tmp_path / "a.txt").read_text() == "x" and not partial.exists()


@pytest.mark.parametrize(
    ("fps", "rate"),
    [
        (24, (24, 1)),
        (23.976, (24000, 1001)),
        (29.97, (30000, 1001)),
        (59.94, (60000, 1001)),
        (12.5, (25, 2)),
        (1, (1, 1)),
    ],
)
def test_frame_rates_are_fractions(fps: float, rate: tuple[int, int]) -> None:
    assert frame_rate(fps) == Fraction(*rate)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_upright(orientation: int, tmp_path: Path) -> None:
    upright = Image.fromarray(pictures(1, 30, 40)[0])
    # By orientation tag, how a camera turns `upright` before it stores it.
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(np.asarray(read_picture(tmp_path / "photo.png")[0]), np.asarray(upright))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_any_8_bit_picture_becomes_rgb(mode: str, tmp_path: Path) -> None:
    picture = Image.fromarray(pictures(1)[0]).convert(mode)
    path = tmp_path / ("photo.jpg" if mode == "CMYK" else "photo.png")
    picture.save(path)
    assert read_picture(path)[0].mode == "RGB"


def test_a_clip_of_any_size_gives_its_first_and_last_frames(tmp_path: Path) -> None:
    frames = pictures(40, 50, 70)
    path = write_with(tmp_path / "clip.mkv", frames, "libx264", gop=12)
    every = decoded(path)
    assert len(every) == 40
    for count in (1, 5, 13, 40):
        assert np.array_equal(frames_of(path, frames=count, keep="first"), every[:count])
        assert np.array_equal(frames_of(path, frames=count, keep="last"), every[-count:])


def test_key_frames_that_later_frames_precede_are_no_harm(tmp_path: Path) -> None:
    options = {"x264-params": "open-gop=1:bframes=4:b-adapt=0:scenecut=0"}
    path = write_with(tmp_path / "open.mkv", pictures(46), "libx264", gop=10, **options)
    every = decoded(path)
    for count in range(1, 14):
        assert np.array_equal(frames_of(path, frames=count, keep="last"), every[-count:])


@pytest.mark.parametrize("codec", ["mpeg4", "libx265", "libvpx-vp9", "mjpeg"])
def test_other_codecs_are_read(codec: str, tmp_path: Path) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this build of FFmpeg has no {codec}")
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write_with(tmp_path / "clip.mkv", pictures(20), codec, gop=6, pix_fmt=pix_fmt)
    every = decoded(path)
    assert np.array_equal(frames_of(path, frames=5, keep="last"), every[-5:])
    assert np.array_equal(frames_of(path, frames=5, keep="first"), every[:5])


@pytest.mark.long
def test_the_end_of_a_long_clip_is_read_without_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_with(tmp_path / "long.mp4", pictures(300), "libx264", gop=10)
    every = decoded(path)
    turned: list[object] = []
    decode = clips._decode

    def counting(*args: object, **kwargs: object) -> object:
        for frame in decode(*args, **kwargs):  # type: ignore[arg-type]
            turned.append(frame)
            yield frame

    monkeypatch.setattr(clips, "_decode", counting)
    assert np.array_equal(frames_of(path, frames=5, keep="last"), every[-5:])
    assert len(turned) < 40
    turned.clear()
    read_frames(path, frames=5, keep="first")
    assert len(turned) == 5


@pytest.mark.parametrize(
    ("clockwise", "matrix"),
    [(0, (1, 0, 0, 1)), (90, (0, 1, -1, 0)), (180, (-1, 0, 0, -1)), (270, (0, -1, 1, 0))],
    ids=["0", "90", "180", "270"],
)
def test_a_phones_clip_is_upright(clockwise: int, matrix: tuple[int, ...], tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", pictures(5))
    stored = decoded(path)
    # A phone writes the sensor's frames, and how to turn them into the track header (ISO 14496-12, 8.3.2).
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    shown = np.rot90(stored, -clockwise // 90, axes=(1, 2))
    for keep in ("first", "last"):
        assert np.array_equal(frames_of(path, frames=5, keep=keep), shown)


def test_inputs_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    words = tmp_path / "words.jpg"
    words.write_text("this is no picture")
    photo, deep, cut = tmp_path / "photo.png", tmp_path / "deep.png", tmp_path / "cut.jpg"
    Image.fromarray(pictures(1)[0]).save(photo)
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(deep)
    Image.fromarray(pictures(1)[0]).save(cut)
    cut.write_bytes(cut.read_bytes()[:600])
    sound = tmp_path / "sound.mkv"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    clip = write(tmp_path / "clip.mp4", pictures(3))
    for path, said in (
        (tmp_path / "absent.png", "does not exist"),
        (tmp_path, "is a folder"),
        (words, "words.jpg is not a picture"),
        (cut, "cut.jpg is not a picture"),
        (clip, "clip.mp4 is not a picture"),
        (deep, "more than 8 bits"),
    ):
        with pytest.raises(Refusal, match=said):
            read_picture(path)
    for keep in ("first", "last"):
        for path, said in (
            (tmp_path / "absent.mp4", "does not exist"),
            (words, "is not a video"),
            (sound, "no video stream"),
            (clip, r"has 3 frames, 5 are needed\n.*repeat the last frame.*\n.*a longer clip$"),
        ):
            with pytest.raises(Refusal, match=said):
                read_frames(path, frames=5, keep=keep)


@pytest.mark.parametrize(
    ("asked", "works"),
    [([0, 1, 2], r"or task.condition_latent_frames=\[0,1\]$"), ([2], "works: a longer clip$")],
)
def test_a_short_clip_is_told_the_latent_frames_that_it_has(tmp_path: Path, asked: list[int], works: str) -> None:
    file = write(tmp_path / "clip.mp4", pictures(7))
    task = task_config(video=str(file), condition_latent_frames=asked)
    with pytest.raises(Refusal, match=works):
        condition_frames(task, clip_of(32, 32, 13))


def test_likeness_of_two_files(tmp_path: Path) -> None:
    frames = pictures(5)
    best, worse = write(tmp_path / "a.mp4", frames, crf=1), write(tmp_path / "b.mp4", frames, crf=35)
    expected = psnr_db(PEAK, np.square(decoded(best).astype(float) - decoded(worse)).mean())
    found = likeness_of_files(best, worse)
    assert found is not None and found.psnr_db == pytest.approx(expected, abs=1e-3)
    assert likeness_of_files(best, write(tmp_path / "c.mp4", frames[:4])) is None
    assert likeness_of_files(best, write(tmp_path / "d.mp4", pictures(5, 64, 64))) is None
    for name, level in (("a.png", 100), ("b.png", 110)):
        Image.fromarray(np.full((16, 16, 3), level, np.uint8)).save(tmp_path / name)
    found = likeness_of_files(tmp_path / "a.png", tmp_path / "b.png")
    assert found is not None and found.psnr_db == pytest.approx(20 * np.log10(255 / 10))


@pytest.mark.ranks
def test_media_imports_no_torch() -> None:
    program = "import sys, cosmos3_pipeline.stages.media; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
