"""The control clips of a transfer. At most one chunk of a clip is in memory. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from PIL import Image

from cosmos3_pipeline.config.schema import TaskConfig
from cosmos3_pipeline.config.tasks import FROM_VIDEO, clips_of, controls_of
from cosmos3_pipeline.errors import Problem, Refusal
from cosmos3_pipeline.planning.chunks import Chunks
from cosmos3_pipeline.planning.geometry import Clip
from cosmos3_pipeline.stages.inputs import background_of
from cosmos3_pipeline.stages.made_controls import maker, missing_opencv
from cosmos3_pipeline.stages.media import Change, each_frame, look_at

# Two clips of the same scene differ by less than this in width over height, because sizes are rounded to pixels.
SAME_SHAPE = 0.02


class ControlClip:
    """One control clip, read once, from its first frame to the last frame that is needed.

    `changes` are the changes that reading has made to the file's pictures so far.
    """

    def __init__(self, name: str, task: TaskConfig, clip: Clip, chunks: Chunks) -> None:
        file = getattr(task.controls, name)
        self.key = f"task.controls.{name}"
        self._chunks = chunks
        self._make = maker(name, task) if file == FROM_VIDEO else None
        self._held: list[Image.Image] = []
        self._start = 0
        self._changes: dict[str, Change] = {}
        file, key = (task.video, "task.video") if file == FROM_VIDEO else (file, self.key)
        self._frames = islice(_frames_of(task, clip, file, key, self._changes), chunks.total)

    @property
    def changes(self) -> list[Change]:
        return list(self._changes.values())

    def chunk(self, number: int) -> list[Image.Image]:
        """The pictures that chunk `number` follows, one for each of its frames. Call it with chunks in order.

        Raises:
            Refusal: the clip has fewer frames.
        """
        shown = self._chunks.shown(number)
        self._held = self._held[shown.start - self._start :]
        self._start = shown.start
        for picture in islice(self._frames, len(shown) - len(self._held)):
            self._held.append(picture if self._make is None else self._make(picture))
        if len(self._held) < len(shown):
            raise Refusal(
                what=f"{self.key} ends after {self._start + len(self._held)} frames",
                why=f"the video has {self._chunks.total}, and the control says what each of them shows",
                works=f"a longer clip, or task.num_frames={self._start + len(self._held)}",
            )
        return [self._held[frame] for frame in self._chunks.mirrored(number)]


def first_frames(task: TaskConfig, clip: Clip, count: int) -> tuple[list[Image.Image], list[Change]]:
    """The first `count` frames of `task.video`, and the changes that reading made to them."""
    changes: dict[str, Change] = {}
    return list(islice(_frames_of(task, clip, task.video, "task.video", changes), count)), list(changes.values())


def _frames_of(
    task: TaskConfig, clip: Clip, file: str | None, key: str, changes: dict[str, Change]
) -> Iterator[Image.Image]:
    assert file is not None
    frames = each_frame(
        file, fps=_rate(task), size=(clip.width, clip.height), background=background_of(task), key=key
    )
    for picture, found in frames:
        changes.update({change.kind: change for change in found})
        yield picture


def _rate(task: TaskConfig) -> float | None:
    return task.fps if task.resample else None


def length_of(task: TaskConfig) -> int:
    """The number of frames of the first control clip.

    Raises:
        Refusal: the clip is no video.
    """
    key, file = next(iter(clips_of(task).items()))
    return look_at(file, fps=_rate(task), key=key).frames


def control_problems(task: TaskConfig) -> Iterator[Problem]:
    """Reasons why the clips of a transfer cannot be followed together. Their files must exist."""
    for name, file in controls_of(task).items():
        if file == FROM_VIDEO and (problem := missing_opencv(f"task.controls.{name}")):
            yield problem
    given = task.num_first_chunk_conditional_frames or 0
    files = clips_of(task)
    video_too = {"task.video": task.video} if given and task.video else {}
    looks = {}
    for key, file in (files | video_too).items():
        try:
            looks[key] = look_at(file, fps=_rate(task), key=key)
        except Refusal as refusal:
            yield refusal.problem
    if given and (video := looks.get("task.video")) and video.frames < given:
        yield Problem(
            what=f"task.num_first_chunk_conditional_frames={given} with task.video of {video.frames} frames",
            why="the first chunk begins with so many of its frames",
            works=f"task.num_first_chunk_conditional_frames={video.frames} at most, or a longer clip",
        )
    read = [key for key in files if key in looks]
    if not read:
        return
    first, reference = read[0], looks[read[0]]
    if task.num_frames is not None and reference.frames < task.num_frames:
        yield Problem(
            what=f"task.num_frames={task.num_frames} with {first} of {reference.frames} frames",
            why="the control says what each frame shows, and there is none after its end",
            works=f"task.num_frames={reference.frames}, or null for as many as the control has",
        )
    for key in read[1:]:
        look = looks[key]
        if look.frames != reference.frames:
            yield Problem(
                what=f"{key} has {look.frames} frames and {first} {reference.frames}",
                why="control clips are of one scene, and say together what each frame shows",
                works="clips of the same length, made of the same video",
            )
        if abs(float(look.aspect / reference.aspect) - 1) > SAME_SHAPE:
            yield Problem(
                what=f"{key} is {float(look.aspect):.3f} times as wide as high, and {first} "
                f"{float(reference.aspect):.3f}",
                why="each would be cropped in another way to fill the video, and they would not fit together",
                works="clips of the same shape, made of the same video",
            )
