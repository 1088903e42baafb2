"""The size of a photograph or clip as `stages.media` will read it. A photograph is not decoded."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from cosmos3_pipeline.errors import Refusal

ORIENTATION = 0x0112  # EXIF
TURNED = (5, 6, 7, 8)  # orientations that show columns as rows


def photograph_size(path: str) -> tuple[int, int]:
    """Height and width in pixels of a photograph, turned by its EXIF orientation. Raises Refusal."""
    from PIL import Image

    file = _existing(path, "task.image")
    try:
        with Image.open(file) as image:
            width, height = image.size
            try:
                turned = image.getexif().get(ORIENTATION, 1) in TURNED
            except Exception:  # an invalid EXIF block can raise anything
                turned = False
    except Exception as error:  # decoders raise ValueError, SyntaxError, struct.error and more
        raise Refusal(
            what=f"task.image={path} is not a picture that can be read",
            why=str(error),
            works="a JPEG, PNG or WebP file; a clip goes to task.video=FILE",
        ) from error
    return (width, height) if turned else (height, width)


def clip_size(path: str) -> tuple[int, int]:
    """Height and width of a clip's first frame, upright, in square pixels. Raises Refusal."""
    import av
    import numpy as np
    from av.error import FFmpegError
    from av.sidedata.sidedata import Type

    file = _existing(path, "task.video")
    try:
        with av.open(str(file)) as container:
            stream = container.streams.best("video")
            frame = next(container.decode(stream), None) if stream is not None else None
            if frame is None:
                raise _no_video(path, "no frame of it can be decoded")
            pixel = stream.sample_aspect_ratio or Fraction(1)
            width, height = frame.width, frame.height
            data = frame.side_data.get(Type.DISPLAYMATRIX)
    except FFmpegError as error:
        raise _no_video(path, str(error)) from error
    if data is not None:
        a, b, _, _, _ = (int(value) for value in np.frombuffer(bytes(data), np.int32)[:5])
        if abs(b) > abs(a):  # rows are shown as columns
            width, height, pixel = height, width, 1 / pixel
    return (height, round(width * pixel)) if pixel > 1 else (round(height / pixel), width)


def _existing(path: str, key: str) -> Path:
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        raise Refusal(
            what=f"{key}={path} is not a file",
            why=f"{file} {'is a folder' if file.is_dir() else 'does not exist'}, and the size of the clip follows "
            "from the picture in it",
            works="the path of a file that exists; a plan alone needs none",
        )
    return file


def _no_video(path: str, why: str) -> Refusal:
    return Refusal(
        what=f"task.video={path} is not a video that can be read",
        why=why,
        works="a file such as MP4, MOV or WebM; a photograph goes to task.image=FILE",
    )
