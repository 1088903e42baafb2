"""Used for pictures and for the frames of clips: laying them on a background and filling a frame."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from PIL import Image

from cosmos3_pipeline.errors import Refusal

RGB = tuple[int, int, int]
WHITE: RGB = (255, 255, 255)
# A cut of less than this share of a side is not reported: rounding to whole latent rows alone can cause it.
LEAST_CUT = 0.001


@dataclass(frozen=True)
class Change:
    """One change that reading made to the picture of a file: `said` in words, and `kind` for programs.

    Kinds: background, colours, cropped, damaged, first_picture, interlaced, missing, orientation, pixels, rate.
    """

    kind: str
    said: str


def existing(path: str | Path, *, key: str) -> Path:
    """The file that `path` names. Raises Refusal, which names `key`, if there is no such file."""
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        kind = "is a folder" if file.is_dir() else "is no regular file" if file.exists() else "does not exist"
        raise Refusal(
            what=f"{key}={path} is not a file", why=f"{file} {kind}", works="the path of a file that exists"
        )
    return file


def laid_on(picture: Image.Image, background: RGB) -> tuple[Image.Image, Change | None]:
    """An RGBA picture as RGB: `background` shows where it is transparent."""
    opaque = picture.convert("RGB")
    alpha = picture.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return opaque, None
    colour = "#{:02x}{:02x}{:02x}".format(*background)
    change = Change("background", f"it is transparent in places, which show task.background ({colour})")
    return Image.composite(opaque, Image.new("RGB", opaque.size, background), alpha), change


def cut_off(stored: tuple[int, int], size: tuple[int, int], pixel: Fraction = Fraction(1)) -> Change | None:
    """The cut that `filling` makes in a picture of `stored` width and height. None if it cuts off nothing."""
    left, top, right, bottom = _kept(stored, size, pixel)
    width, height = 1 - (right - left) / stored[0], 1 - (bottom - top) / stored[1]
    if max(width, height) < LEAST_CUT:
        return None
    part, sides = (width, "width, left and right") if width > height else (height, "height, above and below")
    shown = f"{round(stored[0] * pixel)}x{stored[1]}"
    return Change(
        "cropped", f"{100 * part:.3g}% of its {sides}, are cut off: {shown} has to fill {size[0]}x{size[1]}"
    )


def filling(picture: Image.Image, size: tuple[int, int], pixel: Fraction = Fraction(1)) -> Image.Image:
    """`picture` scaled to fill `size`, width and height in pixels, with equal cuts on both sides.

    `pixel` is width over height of a stored pixel. A picture of the right shape is resized as diffusers'
    `VideoProcessor` resizes it. NVIDIA's `load_conditioning_video` crops in the same way.
    """
    return picture.resize(size, Image.Resampling.BILINEAR, box=_kept(picture.size, size, pixel))


def _kept(stored: tuple[int, int], size: tuple[int, int], pixel: Fraction) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the largest centred box that has the shape of `size`."""
    width, height = stored
    ratio = Fraction(*size) / pixel
    kept_width, kept_height = min(Fraction(width), height * ratio), min(Fraction(height), width / ratio)
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    return float(left), float(top), float(left + kept_width), float(top + kept_height)
