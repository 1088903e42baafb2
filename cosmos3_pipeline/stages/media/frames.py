"""One decoded frame as a player shows it: colours, transparency and orientation."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from av.error import FFmpegError
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from numpy.typing import NDArray
from PIL import Image

from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.stages.media.shown import RGB, Change, laid_on

# Code points of ITU-T H.273. FFmpeg's scaler converts frames with these matrices to RGB. 0 is RGB, 2 unspecified.
MATRICES = {0, 1, 2, 4, 5, 6, 7, 9}
UNTOLD_MATRIX, BT2020 = 2, 9
# Transfer curves of SDR, which screens show alike. NAMES has the curves of HDR, which FFmpeg's scaler converts.
SDR_CURVES = {0, 1, 2, 4, 6, 7, 11, 12, 13, 14, 15}
NAMES = {16: "PQ", 18: "HLG"}
# Primaries that are taken as they are: 1 is BT.709, 0 is reserved, 2 is unspecified.
PRIMARIES_AS_THEY_ARE = {0, 1, 2}
# Frames with an unspecified matrix are BT.709 if they are larger than this, else BT.601. This is mpv's rule
# (`mp_csp_guess_colorspace`).
SD_WIDTH, SD_HEIGHT = 1279, 576
ONE = 1 << 16  # of the fixed-point numbers of a display matrix
# A matrix that turns by a right angle has zeros. A value below this is a rounded zero.
LEAST_TURN = ONE // 64


def picture_of(
    frame: Any, *, pixel: Fraction, background: RGB, key: str
) -> tuple[Image.Image, Fraction, list[Change]]:
    """A decoded frame as RGB and upright, the shape of its pixels, and the changes made to it.

    `pixel` is width over height of a stored pixel. The returned value is that of a pixel of the upright picture.

    Raises:
        Refusal: colours that cannot be converted, or a picture that is not turned by right angles.
    """
    changes: list[Change | None] = []
    transparent = any(component.is_alpha for component in frame.format.components)
    array, change = _rgb(frame, "rgba" if transparent else "rgb24", key)
    changes.append(change)
    array, turned = _upright(array, frame, key)
    picture = Image.fromarray(array)
    if frame.interlaced_frame:
        changes.append(Change("interlaced", "it is interlaced, and a frame shows both of its moments at once"))
    if frame.is_corrupt:
        changes.append(Change("damaged", "it is damaged, and a frame shows what could be decoded"))
    if transparent:
        picture, change = laid_on(picture, background)
        changes.append(change)
    return picture, 1 / pixel if turned else pixel, [change for change in changes if change]


def _rgb(frame: Any, layout: str, key: str) -> tuple[NDArray[np.uint8], Change | None]:
    """A frame as uint8 [H, W, 3 or 4], in the colours of BT.709."""
    matrix, curve, primaries = frame.colorspace, frame.color_trc, frame.color_primaries
    if matrix not in MATRICES:
        raise _other_colours(key, f"a matrix of H.273 number {matrix}")
    told = {"src_colorspace": _untold(frame)} if matrix == UNTOLD_MATRIX else {}
    if curve in SDR_CURVES and primaries in PRIMARIES_AS_THEY_ARE:
        return frame.to_ndarray(format=layout, **told), None
    name = f"{_curve(curve)} in {_primaries(primaries)}"
    deep = "gbrap16le" if layout == "rgba" else "gbrp16le"
    try:
        # The frame becomes RGB of 16 bits before its curve is changed. One conversion would lose small differences
        # of hue.
        stored = frame.reformat(format=deep, dst_color_range=ColorRange.JPEG, **told)
        stored.color_trc = ColorTrc.BT709 if curve in SDR_CURVES else curve
        stored.color_primaries = ColorPrimaries.BT709 if primaries in PRIMARIES_AS_THEY_ARE else primaries
        shown = stored.reformat(
            format=layout, dst_color_trc=ColorTrc.BT709, dst_color_primaries=ColorPrimaries.BT709
        )
    except FFmpegError as error:
        raise _other_colours(key, name) from error
    return shown.to_ndarray(), Change("colours", f"converted to BT.709 from {name}")


def _untold(frame: Any) -> Colorspace:
    if frame.color_primaries == BT2020:
        return Colorspace.BT2020
    is_hd = frame.width > SD_WIDTH or frame.height > SD_HEIGHT
    return Colorspace.ITU709 if is_hd else Colorspace.ITU601


def _curve(number: int) -> str:
    if number in NAMES:
        return NAMES[number]
    return "SDR" if number in SDR_CURVES else _name(ColorTrc, number)


def _primaries(number: int) -> str:
    return "BT.709" if number in PRIMARIES_AS_THEY_ARE else _name(ColorPrimaries, number)


def _name(kind: Any, number: int) -> str:
    return str(kind(number).name) if number in set(kind) else f"H.273 number {number}"


def _other_colours(key: str, name: str) -> Refusal:
    return Refusal(
        what=f"{key} has colours that are coded in another way: {name}",
        why="read as BT.709 they would be other colours, and FFmpeg's scaler does not convert them",
        works="the clip converted to BT.709",
    )


def _upright(array: NDArray[np.uint8], frame: Any, key: str) -> tuple[NDArray[np.uint8], bool]:
    """`array` turned as the display matrix says (ISO 14496-12, 8.3.2), and whether rows have become columns.

    A stored pixel (x, y) is shown at (ax + cy, bx + dy). Phones store rows and columns as the sensor has them, and
    front cameras store them mirrored. The display matrix says how to turn them.
    """
    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return array, False
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(data), np.int32)[:5])
    if max(abs(b), abs(c)) < LEAST_TURN:
        return array[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1], False
    if max(abs(a), abs(d)) < LEAST_TURN:
        return array.swapaxes(0, 1)[:: -1 if b < 0 else 1, :: -1 if c < 0 else 1], True
    raise Refusal(
        what=f"{key} is shown turned, and not by a right angle",
        why=f"its display matrix ({a / ONE:g} {b / ONE:g} {c / ONE:g} {d / ONE:g}) would leave corners empty",
        works="the clip saved upright",
    )
