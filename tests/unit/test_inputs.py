"""Pictures and clips are read as viewers show them, or refused. Each change that reading makes is told."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image, ImageCms, PngImagePlugin

from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.stages.media import each_frame, read_frames, read_picture

# Top left, top right, bottom left, bottom right, each of 8x8 pixels.
QUARTERS = ((220, 30, 30), (30, 200, 30), (30, 30, 220), (240, 240, 240))
HIDDEN = (255, 0, 255)  # under transparency


def quarters() -> np.ndarray:
    return np.array(QUARTERS, np.uint8).reshape(2, 2, 3).repeat(8, 0).repeat(8, 1)


def corners(picture: Image.Image) -> np.ndarray:
    """The colours in the middle of the quarters of a picture, int [4, 3]."""
    pixels = np.asarray(picture).astype(int)
    height, width = pixels.shape[:2]
    return np.array([pixels[y, x] for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(file: Path, kind: bytes, data: bytes) -> Path:
    """A PNG with another chunk after its header."""
    content = file.read_bytes()
    file.write_bytes(content[:33] + chunk(kind, data) + content[33:])
    return file


def promise(file: Path, width: int, height: int) -> Path:
    """A PNG of a hundred bytes whose header says that it is large."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + header + data)
    return file


def adobe_rgb() -> bytes:
    """An ICC profile with the primaries (adapted to D50) and the gamma of Adobe RGB (1998)."""

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))

    gamma = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.19921875 * 256)) + b"\0\0"
    text = b"text\0\0\0\0none\0\0\0\0"
    name = b"desc\0\0\0\0" + struct.pack(">I", 9) + b"Wide RGB\0" + bytes(78 + 1)
    tags = {b"desc": name, b"cprt": text, b"wtpt": xyz(0.9642, 1, 0.8249)}
    tags |= {b"rXYZ": xyz(0.60974, 0.31111, 0.01947), b"gXYZ": xyz(0.20528, 0.62567, 0.06087)}
    tags |= {b"bXYZ": xyz(0.14919, 0.06322, 0.74457), b"rTRC": gamma, b"gTRC": gamma, b"bTRC": gamma}
    at, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for tag, data in tags.items():
        data += bytes(-len(data) % 4)
        table += tag + struct.pack(">2I", at + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", at + len(body), bytes(4), 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H4s", 2000, 1, 1, 0, 0, 0, b"acsp") + bytes(28)
    head += struct.pack(">3i", round(0.9642 * 65536), 65536, round(0.8249 * 65536))
    return head.ljust(128, b"\0") + table + body


def transparent(kind: str, folder: Path) -> Path:
    """The quarters, the top left of which is transparent."""
    rgba = np.dstack([quarters(), np.full((16, 16), 255, np.uint8)])
    rgba[:8, :8] = (*HIDDEN, 0)
    picture = Image.fromarray(rgba)
    opaque = picture.convert("RGB")
    if kind == "webp":
        picture.save(folder / "a.webp", lossless=True, exact=True)
    elif kind == "palette":
        palette = opaque.convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
        palette.save(folder / "a.png", transparency=palette.getpixel((0, 0)))
    elif kind == "tRNS":
        opaque.save(folder / "a.png", transparency=HIDDEN)
    else:
        picture.convert(kind).save(folder / "a.png")
    return next(folder.glob("a.*"))


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 20, 30)], ids=["white", "chosen"])
@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "tRNS", "webp"])
def test_the_background_shows_where_a_picture_is_transparent(
    kind: str, background: tuple[int, int, int], tmp_path: Path
) -> None:
    picture, changes = read_picture(transparent(kind, tmp_path), background=background)
    expected = np.array([background, *QUARTERS[1:]])
    if kind == "LA":
        expected[1:] = np.array(Image.fromarray(quarters()).convert("L").convert("RGB"))[[0, 12, 12], [12, 0, 12]]
    assert np.abs(corners(picture) - expected).max() <= 2
    assert [change.kind for change in changes] == ["background"]


def test_an_opaque_alpha_channel_changes_nothing(tmp_path: Path) -> None:
    Image.fromarray(quarters()).convert("RGBA").save(tmp_path / "a.png")
    picture, changes = read_picture(tmp_path / "a.png")
    assert np.array_equal(np.asarray(picture), quarters()) and changes == []


def test_a_picture_with_a_profile_is_converted_to_srgb(tmp_path: Path) -> None:
    """sRGB's 220, 30, 30 is 189, 35, 35 in Adobe RGB."""
    Image.new("RGB", (16, 16), (189, 35, 35)).save(tmp_path / "wide.png", icc_profile=adobe_rgb())
    picture, (change,) = read_picture(tmp_path / "wide.png")
    assert np.abs(corners(picture) - (220, 30, 30)).max() <= 2
    assert change.kind == "colours" and "Wide RGB" in change.said
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(quarters()).save(tmp_path / "srgb.png", icc_profile=srgb)
    picture, changes = read_picture(tmp_path / "srgb.png")
    assert np.array_equal(np.asarray(picture), quarters()) and changes == []


def test_a_png_that_states_its_gamma_is_converted(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (55, 55, 55)).save(tmp_path / "linear.png")
    with_chunk(tmp_path / "linear.png", b"gAMA", struct.pack(">I", 100000))
    picture, (change,) = read_picture(tmp_path / "linear.png")
    assert np.abs(corners(picture) - 255 * (55 / 255) ** (1 / 2.2)).max() <= 1 and change.kind == "colours"


@pytest.mark.parametrize(
    ("kind", "data", "said"),
    [
        (b"cICP", bytes([9, 16, 0, 1]), "another screen"),
        (b"iCCP", b"x\0\0" + zlib.compress(b"no profile"), "colour profile does not fit"),
    ],
    ids=["PQ", "no profile"],
)
def test_colours_that_cannot_be_converted_are_refused(kind: bytes, data: bytes, said: str, tmp_path: Path) -> None:
    Image.fromarray(quarters()).save(tmp_path / "a.png")
    with pytest.raises(Refusal, match=said):
        read_picture(with_chunk(tmp_path / "a.png", kind, data))


def test_colours_are_read_where_a_png_states_them(tmp_path: Path) -> None:
    """Behind long texts, and not in them. Primaries without a gamma are ignored, as by viewers."""
    adobe = struct.pack(">8I", 31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)
    text, file = b"workflow\0" + b"cICP\x09\x10" * 20000, tmp_path / "a.png"
    Image.fromarray(quarters()).save(file)
    assert read_picture(with_chunk(with_chunk(file, b"cHRM", adobe), b"tEXt", text))[1] == []
    Image.fromarray(quarters()).save(file)
    with pytest.raises(Refusal, match="transfer 16"):  # a chunk is put before those that are there
        read_picture(with_chunk(with_chunk(file, b"cICP", bytes([9, 16, 0, 1])), b"tEXt", text))
    Image.fromarray(quarters()).save(file)
    with pytest.raises(Refusal, match="cHRM"):
        read_picture(with_chunk(with_chunk(file, b"cHRM", adobe), b"gAMA", struct.pack(">I", 45455)))


def test_inks_without_a_profile_are_told(tmp_path: Path) -> None:
    Image.fromarray(quarters()).convert("CMYK").save(tmp_path / "a.jpg")
    assert [change.kind for change in read_picture(tmp_path / "a.jpg")[1]] == ["colours"]


def test_metadata_that_pillow_stumbles_over_does_no_harm(tmp_path: Path) -> None:
    workflow = PngImagePlugin.PngInfo()
    workflow.add_text("workflow", "x" * (2 << 20), zip=True)
    Image.fromarray(quarters()).save(tmp_path / "workflow.png", pnginfo=workflow)
    picture, changes = read_picture(tmp_path / "workflow.png")
    assert np.array_equal(np.asarray(picture), quarters()) and changes == []
    Image.fromarray(quarters()).save(tmp_path / "exif.png", exif=b"{'Make': 'words'}")
    picture, changes = read_picture(tmp_path / "exif.png")
    assert np.array_equal(np.asarray(picture), quarters())
    assert [change.kind for change in changes] == ["orientation"]


@pytest.mark.parametrize("side", [14_000, 100_000])
def test_more_pixels_than_are_decoded_are_refused(side: int, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="has more than 179 million pixels"):
        read_picture(promise(tmp_path / "large.png", side, side))


def test_formats_that_start_a_program_or_read_other_files_are_not_opened(tmp_path: Path) -> None:
    Image.fromarray(quarters()).save(tmp_path / "drawn.eps")
    with pytest.raises(Refusal, match="cannot identify"):
        read_picture(tmp_path / "drawn.eps")
    clip(tmp_path / "clip.mp4", [quarters()] * 3, codec="libx264", pix_fmt="yuv420p")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nclip.mp4\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.ffconcat").write_text("ffconcat version 1.0\nfile clip.mp4\n")
    for name in ("list.m3u8", "list.ffconcat"):
        with pytest.raises(Refusal, match="it is none of MP4 and MOV, WebM"):
            read_frames(tmp_path / name, frames=1)


def test_of_several_pictures_the_first_is_taken(tmp_path: Path) -> None:
    Image.fromarray(quarters()).save(tmp_path / "a.png", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    picture, changes = read_picture(tmp_path / "a.png")
    assert np.array_equal(np.asarray(picture), quarters())
    assert [change.kind for change in changes] == ["first_picture"]


def clip(
    file: Path,
    frames: list[np.ndarray],
    *,
    codec: str = "ffv1",
    pix_fmt: str = "bgr0",
    layout: str = "rgb24",
    times: Callable[[int], int] = lambda number: number,
    rate: int = 24,
    change: Callable[[Any], Any] = lambda frame: frame,
    **settings: Any,
) -> Path:
    """Frames of `layout` as a clip; `times` says when each is shown, in frames of `rate` per second."""
    if codec not in av.codecs_available:
        pytest.skip(f"this build of FFmpeg has no {codec}")
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=settings.pop("options", {}))
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        for number, pixels in enumerate(frames):
            frame = change(av.VideoFrame.from_ndarray(pixels, format=layout))
            frame.pts, frame.time_base = times(number), Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file


def numbered(count: int) -> list[np.ndarray]:
    """Gray frames, each of its number's brightness."""
    return [np.full((16, 16, 3), number, np.uint8) for number in range(count)]


def numbers(pictures: list[Image.Image]) -> list[int]:
    return [int(np.asarray(picture)[0, 0, 0]) for picture in pictures]


# As exact as H.264 is, but for rounding to YUV.
LOSSLESS: dict[str, Any] = {"codec": "libx264", "pix_fmt": "yuv444p", "options": {"qp": "0"}}
TURNS: dict[str, tuple[tuple[int, ...], Callable[[np.ndarray], np.ndarray]]] = {
    "as stored": ((1, 0, 0, 1), lambda a: a),
    "mirrored": ((-1, 0, 0, 1), lambda a: a[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda a: a[::-1]),
    "half a turn": ((-1, 0, 0, -1), lambda a: a[::-1, ::-1]),
    "clockwise": ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),
    "counter-clockwise": ((0, -1, 1, 0), lambda a: np.rot90(a)),
    "transposed": ((0, 1, 1, 0), lambda a: a.swapaxes(0, 1)),
    "transversed": ((0, -1, -1, 0), lambda a: np.rot90(a, 2).swapaxes(0, 1)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_a_clip_is_shown_as_its_display_matrix_says(turn: str, tmp_path: Path) -> None:
    """ISO 14496-12, 8.3.2: (a b u c d v x y w) of the track header."""
    (a, b, c, d), shown = TURNS[turn]
    path = clip(tmp_path / "clip.mp4", [quarters()[:, :12]], **LOSSLESS)
    stored = np.asarray(read_frames(path, frames=1)[0][0])
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44
    data[start : start + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    assert np.array_equal(np.asarray(read_frames(path, frames=1)[0][0]), shown(stored))
    data[start : start + 36] = struct.pack(">9i", 46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    with pytest.raises(Refusal, match="not by a right angle"):
        read_frames(path, frames=1)


def test_a_clip_of_another_shape_is_cropped_and_not_stretched(tmp_path: Path) -> None:
    tall = np.vstack([np.full((16, 16, 3), 200, np.uint8), quarters(), np.full((16, 16, 3), 200, np.uint8)])
    path = clip(tmp_path / "tall.mkv", [tall])
    (picture,), (change,) = read_frames(path, frames=1, size=(32, 32))
    expected = np.asarray(Image.fromarray(quarters()).resize((32, 32), Image.Resampling.BILINEAR))
    # At the edge of the part that is kept, a resize sees what is beyond it.
    assert np.abs(np.asarray(picture)[2:-2].astype(int) - expected[2:-2]).max() <= 1
    assert change.kind == "cropped" and change.said.startswith("66.7% of its height")
    (picture,), changes = read_frames(path, frames=1, size=(32, 96))
    assert np.array_equal(np.asarray(picture), np.asarray(Image.fromarray(tall).resize((32, 96), 2)))
    assert changes == []


def test_pixels_become_square(tmp_path: Path) -> None:
    path = clip(tmp_path / "wide.mp4", [quarters()], sample_aspect_ratio=Fraction(2, 1), **LOSSLESS)
    (picture,), (change,) = read_frames(path, frames=1)
    assert picture.size == (32, 16) and change.kind == "pixels"
    assert np.abs(corners(picture) - QUARTERS).max() <= 3
    (picture,), changes = read_frames(path, frames=1, size=(16, 16))
    assert [each.kind for each in changes] == ["pixels", "cropped"]
    assert np.abs(np.asarray(picture)[4, 2].astype(int) - QUARTERS[0]).max() <= 3


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [("a.webm", "libvpx-vp9", "yuva420p"), ("a.mov", "prores_ks", "yuva444p10le"), ("a.mkv", "ffv1", "bgra")],
)
def test_the_background_shows_where_a_clip_is_transparent(
    name: str, codec: str, pix_fmt: str, tmp_path: Path
) -> None:
    frame = np.zeros((64, 64, 4), np.uint8)
    frame[:] = (*HIDDEN, 0)
    frame[:, 32:] = (30, 200, 30, 255)
    path = clip(tmp_path / name, [frame] * 5, codec=codec, pix_fmt=pix_fmt, layout="rgba")
    pictures, changes = read_frames(path, frames=5, background=(10, 20, 30))
    for picture in pictures:
        expected = [(10, 20, 30), (30, 200, 30)] * 2
        assert np.abs(corners(picture) - expected).max() <= 12  # lossy, and colours of pairs of pixels
    assert [change.kind for change in changes] == ["background"]


# Rec. ITU-R BT.2087: linear BT.709 in BT.2020.
WIDER = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])


def pq(nits: np.ndarray) -> np.ndarray:
    """Rec. ITU-R BT.2100, table 4."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = (nits / 10000) ** m1
    return np.asarray(((c1 + c2 * power) / (1 + c3 * power)) ** m2)


def hlg(nits: np.ndarray) -> np.ndarray:
    """Rec. ITU-R BT.2100, table 5, for a screen of 1000 nits."""
    shown = nits / 1000
    luminance = shown @ np.array([0.2627, 0.678, 0.0593])
    scene = shown * luminance[..., None] ** (1 / 1.2 - 1)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    high = a * np.log(np.maximum(12 * scene - b, 1e-9)) + c
    return np.asarray(np.where(scene <= 1 / 12, np.sqrt(3 * scene), high))


@pytest.mark.long
@pytest.mark.parametrize(("curve", "trc"), [(pq, ColorTrc.SMPTE2084), (hlg, ColorTrc.ARIB_STD_B67)])
def test_hdr_is_shown_as_sdr(curve: Callable[[np.ndarray], np.ndarray], trc: ColorTrc, tmp_path: Path) -> None:
    """White of SDR is 203 nits (Rec. ITU-R BT.2408), and its screens have a gamma of 2.4 (BT.1886)."""
    nits = 203 * (quarters() / 255) ** 2.4 @ WIDER.T
    coded = np.round(curve(nits) * 65535).astype(np.uint16)

    def to_yuv(frame: Any) -> Any:
        yuv = {"dst_colorspace": Colorspace.BT2020, "dst_color_range": ColorRange.MPEG}
        return frame.reformat(format="yuv444p10le", **yuv)

    path = clip(
        tmp_path / "hdr.mkv",
        [coded],
        pix_fmt="yuv444p10le",
        layout="rgb48le",
        change=to_yuv,
        colorspace=9,
        color_range=1,
        color_trc=trc,
        color_primaries=ColorPrimaries.BT2020,
    )
    (picture,), (change,) = read_frames(path, frames=1)
    found = corners(picture)
    assert np.abs(found[3] - QUARTERS[3]).max() <= 2
    # FFmpeg's scaler looks colours up in a table of 33 steps.
    assert np.abs(found - QUARTERS).max() <= 16
    assert change.kind == "colours" and ("PQ" if curve is pq else "HLG") in change.said


@pytest.mark.parametrize(("height", "matrix"), [(720, Colorspace.ITU709), (480, Colorspace.ITU601)])
def test_what_is_not_told_of_the_colours_is_what_players_assume(
    height: int, matrix: Colorspace, tmp_path: Path
) -> None:
    frame = np.zeros((height, 64, 3), np.uint8)
    frame[:] = QUARTERS[0]

    def to_yuv(frame: Any) -> Any:
        return frame.reformat(format="yuv444p", dst_colorspace=matrix, dst_color_range=ColorRange.MPEG)

    path = clip(tmp_path / "a.mp4", [frame], codec="libx264", pix_fmt="yuv444p", change=to_yuv)
    (picture,), changes = read_frames(path, frames=1)
    assert np.abs(corners(picture) - QUARTERS[0]).max() <= 4 and changes == []


def test_an_interlaced_clip_is_told(tmp_path: Path) -> None:
    frame = np.full((64, 64, 3), 100, np.uint8)
    options = {"flags": "+ilme+ildct"}
    path = clip(tmp_path / "a.mp4", [frame] * 3, codec="libx264", pix_fmt="yuv420p", options=options)
    assert [change.kind for change in read_frames(path, frames=3)[1]] == ["interlaced"]


@pytest.mark.parametrize(
    ("keep", "expected"), [("first", [0, 2, 5, 7, 10]), ("last", [19, 21, 24, 26, 29])], ids=str
)
def test_a_clip_is_taken_at_the_rate_of_the_video(keep: str, expected: list[int], tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mov", numbered(30), codec="png", pix_fmt="rgb24", rate=60)
    pictures, (change,) = read_frames(path, frames=5, keep=keep, fps=24)
    assert numbers(pictures) == expected
    assert change.kind == "rate" and "24 frames per second" in change.said and "60" in change.said
    pictures, changes = read_frames(path, frames=5, keep=keep)
    assert numbers(pictures) == ([0, 1, 2, 3, 4] if keep == "first" else [25, 26, 27, 28, 29]) and changes == []
    pictures, changes = read_frames(path, frames=5, keep=keep, fps=60)
    assert changes == []
    with pytest.raises(Refusal, match=r"has 12 frames at 24 frames per second, 13 are needed"):
        read_frames(path, frames=13, keep=keep, fps=24)


def test_frames_stay_as_long_as_their_time_stamps_say(tmp_path: Path) -> None:
    path = clip(tmp_path / "uneven.mkv", numbered(6), times=[0, 1, 4, 5, 6, 7].__getitem__)
    pictures, (change,) = read_frames(path, frames=7, fps=24)
    assert numbers(pictures) == [0, 1, 1, 1, 2, 3, 4] and change.kind == "rate"


def test_a_file_without_time_stamps_is_counted(tmp_path: Path) -> None:
    frames = [np.full((64, 64, 3), 20 * number, np.uint8) for number in range(10)]
    path = clip(tmp_path / "a.h264", frames, codec="libx264", pix_fmt="yuv444p", options={"qp": "0"}, rate=25)
    for keep in ("first", "last"):
        pictures, changes = read_frames(path, frames=4, keep=keep, fps=25)
        expected = [0, 20, 40, 60] if keep == "first" else [120, 140, 160, 180]
        assert np.abs(np.array(numbers(pictures)) - expected).max() <= 2 and changes == []


def test_a_clip_that_promises_a_billion_frames_is_refused(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4", [quarters()] * 3, codec="libx264", pix_fmt="yuv420p")
    data = bytearray(path.read_bytes())
    billion = struct.pack(">I", 10**9)
    for box, place in ((b"stsz", 12), (b"stts", 12), (b"stsc", 16)):
        at = data.index(box) + place
        data[at : at + 4] = billion
    at = data.index(b"stsz") + 8
    data[at : at + 4] = struct.pack(">I", 100)  # bytes of each, which the billion then all have
    path.write_bytes(data)
    with pytest.raises(Refusal, match="is not a video that can be read"):
        read_frames(path, frames=1)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "mpeg2video"])
def test_a_damaged_clip_is_told(tmp_path: Path, codec: str) -> None:
    """Zeros end a frame early in every codec. Other bytes can be a valid picture, and no decoder notices."""
    file, noise = tmp_path / "a.mp4", np.random.default_rng(0).integers(0, 255, (12, 48, 64, 3), np.uint8)
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=24, width=64, height=48, pix_fmt="yuv420p")
        for frame in (*map(av.VideoFrame.from_ndarray, noise), None):
            container.mux(stream.encode(frame))
    assert read_frames(file, frames=12)[1] == []
    with av.open(str(file)) as container:
        stored = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = file.read_bytes()
    for pos, size in stored:
        damaged = bytearray(content)
        damaged[pos + size // 2 : pos + size] = bytes(size - size // 2)
        file.write_bytes(damaged)
        assert [change.kind for change in read_frames(file, frames=12)[1]] == ["damaged"]


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4")]
)
def test_a_clip_whose_end_is_missing_is_told(name: str, codec: str, tmp_path: Path) -> None:
    """As a broken download leaves it. Its first frames are all there."""
    file, noise = tmp_path / name, np.random.default_rng(0).integers(0, 255, (24, 48, 64, 3), np.uint8)
    with av.open(str(file), "w", options={"movflags": "faststart"} if name == "a.mp4" else {}) as container:
        stream = container.add_stream(codec, rate=24, width=64, height=48, pix_fmt="yuv420p")
        stream.codec_context.gop_size = 4
        for frame in (*map(av.VideoFrame.from_ndarray, noise), None):
            container.mux(stream.encode(frame))

    def changes() -> dict[str, list[str]]:
        every = [change for _, found in each_frame(file, fps=24, size=(64, 48)) for change in found]
        given = {keep: read_frames(file, frames=5, keep=keep, fps=24)[1] for keep in ("first", "last")}
        return {way: [one.said for one in found] for way, found in {**given, "every": every}.items()}

    assert changes() == {"first": [], "last": [], "every": []}
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * 0.6)])
    told = changes()
    assert told["first"] == []
    for way in ("last", "every"):
        assert sum("its end is missing: its header says 1.00 s" in said for said in told[way]) == 1
    with pytest.raises(Refusal, match="its end is missing"):
        read_frames(file, frames=24)


def test_the_cover_of_music_is_no_clip(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.m4a"), "w", format="mp4") as container:
        stream = container.add_stream("mjpeg", rate=1, width=64, height=48, pix_fmt="yuvj420p")
        stream.disposition = av.stream.Disposition.attached_pic
        for frame in (av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8)), None):
            container.mux(stream.encode(frame))
    with pytest.raises(Refusal, match="no video stream"):
        read_frames(tmp_path / "a.m4a", frames=1)
