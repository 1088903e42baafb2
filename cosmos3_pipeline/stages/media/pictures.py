"""A photograph as a viewer shows it: upright, in sRGB, laid on a background."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

from PIL import Image, ImageChops, ImageCms, ImageOps, PngImagePlugin

from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.stages.media.shown import RGB, WHITE, Change, cut_off, existing, filling, laid_on

# No other formats are opened. For EPS Pillow would start another program, and the others are not for photographs.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")
WORKS = f"one of {', '.join(FORMATS)}; a video goes to task=v2v task.video=FILE"
# Workflows and edit histories in a PNG may be larger than Pillow's 1 MiB for one text. This is Pillow's own limit
# for all texts together.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
ORIENTATION = 0x0112  # EXIF
# Colour spaces of ICC profiles (ICC.1, 7.2.6) and Pillow's modes for them.
PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
# A profile that changes no channel by more than this is sRGB under another name. The picture is then not
# converted.
SAME_COLOUR = 2
# Code points of ITU-T H.273 for SDR, and unspecified. 8-bit pictures with these codes are shown as they are.
SDR_TRANSFERS = {1, 2, 4, 5, 6, 7, 11, 12, 13, 14, 15}
SDR_PRIMARIES = {1, 2, 5, 6, 7}
# White, red, green and blue of sRGB, as x and y each, in the order of the PNG chunk cHRM.
SRGB_CHROMATICITY = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
LEAST_CHROMATICITY = 0.01  # a difference that is no rounding
SHORT_CHUNK = 64  # bytes of a PNG's chunk; cICP has 4
SRGB_GAMMA = 1 / 2.2  # as the PNG chunk gAMA states it


def read_picture(
    path: str | Path, *, size: tuple[int, int] | None = None, background: RGB = WHITE, key: str = "task.image"
) -> tuple[Image.Image, list[Change]]:
    """The picture in `path` in sRGB, turned as its EXIF orientation says, and the changes made to it.

    With `size`, width and height in pixels, the picture is scaled and cropped to fill that size. If the file has
    several pictures, the first is taken. A refusal names `key`.

    Raises:
        Refusal: no such file, not a picture of 8 bits per channel, or colours that cannot be converted.
    """
    file = existing(path, key=key)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures and broken metadata
            with Image.open(file, formats=FORMATS) as image:
                _refuse_other_depths(image, file)
                _refuse_other_codings(file, image.format)
                picture, changes = _as_shown(image, background)
    except Refusal:
        raise
    except Image.DecompressionBombError as error:
        raise Refusal(
            what=f"{key}={path} has more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels",
            why=str(error),
            works="the picture scaled down; one larger than the video loses its details anyway",
        ) from error
    except Exception as error:  # decoders raise ValueError, SyntaxError, struct.error and more
        raise Refusal(
            what=f"{key}={path} is not a picture that can be read",
            why=str(error) or type(error).__name__,
            works=WORKS,
        ) from error
    if size is not None:
        changes += [change for change in [cut_off(picture.size, size)] if change]
        picture = filling(picture, size)
    return picture, changes


def _refuse_other_depths(image: Image.Image, file: Path) -> None:
    if image.mode[0] in "IF":
        raise Refusal(
            what=f"{file} has more than 8 bits per pixel (mode {image.mode})",
            why="its brightness cannot be turned into 0..255 without knowing its range",
            works="the picture saved with 8 bits per channel",
        )


def _refuse_other_codings(file: Path, kind: str | None) -> None:
    """Refuse HDR and wide gamuts that are stated without a profile, because Pillow does not read them."""
    found = None
    if kind == "PNG":
        chunk = _png_header(file).get(b"cICP", b"")
        found = (chunk[0], chunk[1]) if len(chunk) == 4 else None
    elif kind == "AVIF":
        with file.open("rb") as opened:
            head = opened.read(1 << 16)
        if (at := head.find(b"colrnclx")) >= 0:
            found = int.from_bytes(head[at + 8 : at + 10]), int.from_bytes(head[at + 10 : at + 12])
    if found is not None and not (found[0] in SDR_PRIMARIES and found[1] in SDR_TRANSFERS):
        raise _other_screen(file, f"H.273 primaries {found[0]}, transfer {found[1]}")


def _other_screen(file: Path, coding: str) -> Refusal:
    return Refusal(
        what=f"{file} has colours that are coded for another screen ({coding})",
        why="read as sRGB they would be other colours, and without a profile they are not converted",
        works="the picture saved as sRGB, or with an ICC profile",
    )


def _png_header(file: Path) -> dict[bytes, bytes]:
    """The short chunks of a PNG before its pixels. Texts of any length may be between them."""
    found = dict[bytes, bytes]()
    with file.open("rb") as opened:
        opened.seek(8)
        while len(head := opened.read(8)) == 8 and head[4:] != b"IDAT":
            length = int.from_bytes(head[:4])
            if length <= SHORT_CHUNK:
                found[head[4:]] = opened.read(length)
            opened.seek(4 + (0 if length <= SHORT_CHUNK else length), 1)
    return found


def _as_shown(image: Image.Image, background: RGB) -> tuple[Image.Image, list[Change]]:
    found: list[Change | None] = []
    if getattr(image, "is_animated", False):
        found.append(Change("first_picture", "it holds several pictures, of which the first is taken"))
    image.load()
    profile, gamma = image.info.get("icc_profile"), image.info.get("gamma")
    shown, change = _upright(image)
    found.append(change)
    alpha = shown.convert("RGBA").getchannel("A") if shown.has_transparency_data else None
    shown = shown if shown.mode in PROFILE_MODES.values() and alpha is None else _opaque(shown)
    if profile:
        shown, change = _converted(shown, profile)
        found.append(change)
    elif gamma and "srgb" not in image.info and image.format == "PNG":
        _refuse_other_primaries(image)
        shown, change = _with_gamma(shown.convert("RGB"), gamma)
        found.append(change)
    elif shown.mode == "CMYK":
        found.append(Change("colours", "converted to sRGB from inks (CMYK) without a colour profile"))
    shown = shown.convert("RGB")
    if alpha is not None:
        shown.putalpha(alpha)
        shown, change = laid_on(shown, background)
        found.append(change)
    return shown, [change for change in found if change]


def _opaque(image: Image.Image) -> Image.Image:
    """The stored colours without transparency, in a mode that profiles know."""
    gray = image.mode in ("1", "L", "LA", "La")
    return image.convert("RGBA").convert("L" if gray else "RGB")


def _upright(image: Image.Image) -> tuple[Image.Image, Change | None]:
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception as error:  # bytes that are no EXIF raise errors of many kinds
        return image, Change("orientation", f"its EXIF cannot be read ({error}), so it is taken as it is stored")
    return (image if orientation == 1 else ImageOps.exif_transpose(image)), None


def _converted(image: Image.Image, profile: bytes) -> tuple[Image.Image, Change | None]:
    """`image` converted to sRGB from the colours of its ICC `profile`."""
    try:
        theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = PROFILE_MODES[theirs.profile.xcolor_space.strip()]
        if image.mode == "L" and mode == "RGB":
            image = image.convert("RGB")
        srgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, theirs, srgb, outputMode="RGB")
        assert converted is not None
        name = ImageCms.getProfileDescription(theirs).strip()
    except (ImageCms.PyCMSError, KeyError, OSError) as error:
        raise Refusal(
            what=f"the picture's colour profile does not fit its colours (mode {image.mode})",
            why=str(error),
            works="the picture saved as sRGB",
        ) from error
    if image.mode == "RGB" and _furthest(image, converted) <= SAME_COLOUR:
        return image, None
    return converted, Change("colours", f"converted to sRGB from its colour profile ({name})")


def _with_gamma(image: Image.Image, gamma: float) -> tuple[Image.Image, Change | None]:
    """Convert a PNG that states a gamma, but no profile and no sRGB (PNG, 13.13: a display's exponent of 2.2)."""
    corrected = image.point([round(255 * (v / 255) ** (SRGB_GAMMA / gamma)) for v in range(256)] * 3)
    if _furthest(image, corrected) <= SAME_COLOUR:
        return image, None
    return corrected, Change("colours", f"converted to sRGB from a gamma of {gamma:g}")


def _refuse_other_primaries(image: Image.Image) -> None:
    """Refuse a PNG that states a gamma and other primaries. Viewers ignore primaries without a gamma."""
    stated = image.info.get("chromaticity", SRGB_CHROMATICITY)
    if max(abs(one - other) for one, other in zip(stated, SRGB_CHROMATICITY, strict=True)) > LEAST_CHROMATICITY:
        raise _other_screen(Path(image.filename), "primaries of the chunk cHRM")  # type: ignore[attr-defined]


def _furthest(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two RGB pictures in any channel."""
    return max(int(high) for _, high in ImageChops.difference(one, other).getextrema())  # type: ignore[misc]
