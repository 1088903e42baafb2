"""The input pictures that condition a task, read in the form that its clip needs. Imports no torch."""

from __future__ import annotations

from PIL import Image

from cosmos3_pipeline.config.schema import TaskConfig
from cosmos3_pipeline.planning.geometry import Clip
from cosmos3_pipeline.stages.media import Change, read_frames, read_picture
from cosmos3_pipeline.stages.media.shown import RGB, cut_off


def photograph(task: TaskConfig, clip: Clip) -> tuple[Image.Image, list[Change]]:
    """`task.image` in its own size, and the changes made to it. diffusers scales it to fill `clip` and crops it.

    Raises:
        Refusal: the picture cannot be read, see `read_picture`.
    """
    assert task.image is not None
    picture, changes = read_picture(task.image, background=background_of(task))
    cropped = cut_off(picture.size, (clip.width, clip.height))
    return picture, [*changes, cropped] if cropped else changes


def both_ends(task: TaskConfig, clip: Clip) -> tuple[list[Image.Image], dict[str, list[Change]]]:
    """`task.image` and `task.last_image` in the size of `clip`, and the changes made to each, by its config key.

    Raises:
        Refusal: a picture cannot be read, see `read_picture`.
    """
    pictures: list[Image.Image] = []
    changes: dict[str, list[Change]] = {}
    for key, file in (("task.image", task.image), ("task.last_image", task.last_image)):
        assert file is not None
        picture, changes[key] = read_picture(
            file, key=key, size=(clip.width, clip.height), background=background_of(task)
        )
        pictures.append(picture)
    return pictures, changes


def condition_frames(task: TaskConfig, clip: Clip) -> tuple[list[Image.Image], list[Change]]:
    """The frames of `task.video` that its last conditioning latent frame depends on, in the size of `clip`.

    Raises:
        Refusal: the frames cannot be read, see `read_frames`.
    """
    assert task.video is not None
    given = task.condition_latent_frames

    def fewer(found: int) -> str | None:
        within = [str(frame) for frame in given if frame * clip.temporal < found]
        return f"task.condition_latent_frames=[{','.join(within)}]" if within else None

    return read_frames(
        task.video,
        frames=max(given) * clip.temporal + 1,
        fewer=fewer,
        keep=task.condition_keep.value,
        fps=task.fps if task.resample else None,
        size=(clip.width, clip.height),
        background=background_of(task),
    )


def observation(task: TaskConfig, frames: int, temporal: int) -> tuple[list[Image.Image], str, list[Change]]:
    """The pictures that condition a task with actions, in their own size, their config key, and their changes.

    They are `task.image`, or the first or last `frames` frames of `task.video` (`task.condition_keep`). A latent
    frame shows `temporal` frames.

    Raises:
        Refusal: the pictures cannot be read, or the video has fewer frames.
    """
    if task.image is not None:
        picture, changes = read_picture(task.image, background=background_of(task))
        return [picture], "task.image", changes
    assert task.video is not None

    def fewer(found: int) -> str | None:
        steps = (found - 1) // temporal * temporal  # an action leads from a frame to the next
        return f"task.chunk_size={steps}" if steps else None

    pictures, changes = read_frames(
        task.video,
        frames=frames,
        fewer=fewer,
        keep=task.condition_keep.value,
        fps=task.fps if task.resample else None,
        background=background_of(task),
    )
    return pictures, "task.video", changes


def background_of(task: TaskConfig) -> RGB:
    """`task.background` as a colour."""
    red, green, blue = task.background
    return red, green, blue
