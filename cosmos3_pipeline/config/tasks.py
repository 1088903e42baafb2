"""What each task is given besides words, said once for checks, plans and stages."""

from __future__ import annotations

from dataclasses import dataclass

from cosmos3_pipeline.config.schema import TaskName


@dataclass(frozen=True)
class Given:
    """A file that a task is conditioned on, by its key in `task`, with an example of its name."""

    key: str
    what: str
    example: str


PHOTOGRAPH = Given("image", "a photograph", "photo.jpg")
LAST_PHOTOGRAPH = Given("last_image", "a photograph of its last frame", "last.jpg")
CLIP = Given("video", "a clip", "clip.mp4")

# By task, what it needs.
GIVEN: dict[TaskName, tuple[Given, ...]] = {
    TaskName.t2v: (),
    TaskName.t2i: (),
    TaskName.i2v: (PHOTOGRAPH,),
    TaskName.v2v: (CLIP,),
    TaskName.flf2v: (PHOTOGRAPH, LAST_PHOTOGRAPH),
    TaskName.policy: (),
    TaskName.forward_dynamics: (),
    TaskName.inverse_dynamics: (CLIP,),
}
# By task, what it needs one of.
EITHER: dict[TaskName, tuple[Given, ...]] = {
    TaskName.policy: (PHOTOGRAPH, CLIP),
    TaskName.forward_dynamics: (PHOTOGRAPH, CLIP),
}
# The latent frames that a task's files are for, counted from the end where negative; others let the user choose.
FRAMES: dict[TaskName, list[int]] = {
    TaskName.t2v: [],
    TaskName.t2i: [],
    TaskName.i2v: [0],
    TaskName.flf2v: [0, -1],
}
ALL_GIVEN = tuple(dict.fromkeys(given for needed in GIVEN.values() for given in needed))


def readers(given: Given) -> list[str]:
    """The names of the tasks that read such a file."""
    return [task.value for task in GIVEN if given in read_by(task)]


def read_by(task: TaskName) -> tuple[Given, ...]:
    """The files that a task reads: those that it needs, and those of which it needs one."""
    return (*GIVEN[task], *EITHER.get(task, ()))
