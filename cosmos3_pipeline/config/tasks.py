"""What each task is given besides words, said once for checks, plans and stages."""

from __future__ import annotations

from dataclasses import dataclass

from cosmos3_pipeline.config.schema import Config, TaskConfig, TaskName


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
    TaskName.transfer: (),
}
# By task, what it needs one of.
EITHER: dict[TaskName, tuple[Given, ...]] = {
    TaskName.policy: (PHOTOGRAPH, CLIP),
    TaskName.forward_dynamics: (PHOTOGRAPH, CLIP),
}
# What it may have besides.
OPTIONAL: dict[TaskName, tuple[Given, ...]] = {TaskName.transfer: (CLIP,)}
# The latent frames that a task's files are for, counted from the end where negative; others let the user choose.
FRAMES: dict[TaskName, list[int]] = {
    TaskName.t2v: [],
    TaskName.t2i: [],
    TaskName.i2v: [0],
    TaskName.flf2v: [0, -1],
    TaskName.transfer: [],
}
ALL_GIVEN = tuple(dict.fromkeys(given for needed in GIVEN.values() for given in needed))


# The keys of `task` that name a file, and those whose words may be in one, as `@FILE`.
PATHS = (*(given.key for given in ALL_GIVEN), "prompt_file", "actions")
WORDS = ("prompt", "negative_prompt")


def readers(given: Given) -> list[str]:
    """The names of the tasks that read such a file."""
    return [task.value for task in GIVEN if given in read_by(task)]


def read_by(task: TaskName) -> tuple[Given, ...]:
    """The files that a task reads: those that it needs, those of which it needs one, and those it may have."""
    return (*GIVEN[task], *EITHER.get(task, ()), *OPTIONAL.get(task, ()))


# What follows is of transfer. Its keys in `task`, which other tasks do not read.
TRANSFER_KEYS = (
    *("edge_threshold", "blur_strength", "control_guidance", "num_video_frames_per_chunk"),
    *("num_conditional_frames", "num_first_chunk_conditional_frames"),
)
CONTROLS = ("edge", "blur", "depth", "seg", "wsm")  # in the order in which diffusers packs them
FROM_VIDEO = "from_video"  # in place of a file: the control is made of task.video
MADE = {"edge": "edge_threshold", "blur": "blur_strength"}  # those that can be, and the key that says how


def controls_of(task: TaskConfig) -> dict[str, str]:
    """The controls that are given, by name: a file, or `FROM_VIDEO`."""
    return {name: file for name in CONTROLS if (file := getattr(task.controls, name))}


def clips_of(task: TaskConfig) -> dict[str, str]:
    """The files that the controls are read from, or made of, by their keys."""
    found = {}
    for name, file in controls_of(task).items():
        if file != FROM_VIDEO:
            found[f"task.controls.{name}"] = file
        elif task.video is not None:
            found["task.video"] = task.video
    return found


def controls_planned(task: TaskConfig) -> int:
    """How many controls a plan is made for; one where a transfer has none yet."""
    return max(len(controls_of(task)), 1) if task.name is TaskName.transfer else 0


def paths_of(cfg: Config) -> dict[str, str]:
    """All that a composition names by a path, here or on the hub, by the keys that name it."""
    task = cfg.task
    found = {f"task.{key}": getattr(task, key) for key in PATHS}
    found |= {f"task.{key}": words[1:] for key in WORDS if (words := getattr(task, key) or "").startswith("@")}
    found |= {f"task.controls.{name}": file for name, file in controls_of(task).items() if file != FROM_VIDEO}
    found |= {f"model.lora[{number}].path": one.path for number, one in enumerate(cfg.model.lora)}
    found |= {"model.path": cfg.model.path, "verify.latents": cfg.verify.latents}
    return {key: path for key, path in found.items() if path is not None}
