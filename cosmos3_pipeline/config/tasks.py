"""The input files of each task, in one place for checks, plans and stages."""

from __future__ import annotations

from dataclasses import dataclass

from cosmos3_pipeline.config.schema import Config, TaskConfig, TaskName


@dataclass(frozen=True)
class Given:
    """A file that a task is conditioned on: its key in `task`, its words, and an example of its name."""

    key: str
    what: str
    example: str


PHOTOGRAPH = Given("image", "a photograph", "photo.jpg")
LAST_PHOTOGRAPH = Given("last_image", "a photograph of its last frame", "last.jpg")
CLIP = Given("video", "a clip", "clip.mp4")

# The files that each task needs.
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
# Files of which a task needs one.
EITHER: dict[TaskName, tuple[Given, ...]] = {
    TaskName.policy: (PHOTOGRAPH, CLIP),
    TaskName.forward_dynamics: (PHOTOGRAPH, CLIP),
}
# Optional files of a task.
OPTIONAL: dict[TaskName, tuple[Given, ...]] = {TaskName.transfer: (CLIP,)}
# The latent frames that a task's files condition; a negative index counts from the end. The user of any other task
# chooses them.
FRAMES: dict[TaskName, list[int]] = {
    TaskName.t2v: [],
    TaskName.t2i: [],
    TaskName.i2v: [0],
    TaskName.flf2v: [0, -1],
    TaskName.transfer: [],
}
ALL_GIVEN = tuple(dict.fromkeys(given for needed in GIVEN.values() for given in needed))


# The keys of `task` that name a file, and the keys whose text may be in a file, as `@FILE`.
PATHS = (*(given.key for given in ALL_GIVEN), "prompt_file", "actions")
WORDS = ("prompt", "negative_prompt")


def readers(given: Given) -> list[str]:
    """The names of the tasks that read this file."""
    return [task.value for task in GIVEN if given in inputs_of(task)]


def inputs_of(task: TaskName) -> tuple[Given, ...]:
    """The files that a task reads: needed files, files of which it needs one, and optional files."""
    return (*GIVEN[task], *EITHER.get(task, ()), *OPTIONAL.get(task, ()))


# The rest of this module is about transfer. Only transfer reads these keys of `task`.
TRANSFER_KEYS = (
    *("edge_threshold", "blur_strength", "control_guidance", "num_video_frames_per_chunk"),
    *("num_conditional_frames", "num_first_chunk_conditional_frames"),
)
CONTROLS = ("edge", "blur", "depth", "seg", "wsm")  # in diffusers' order
FROM_VIDEO = "from_video"  # set instead of a file: the control is made from task.video
# Controls that can be made from a video, each with the key for its strength.
MADE = {"edge": "edge_threshold", "blur": "blur_strength"}


def controls_of(task: TaskConfig) -> dict[str, str]:
    """The controls that are set, by name: a file, or `FROM_VIDEO`."""
    return {name: file for name in CONTROLS if (file := getattr(task.controls, name)) is not None}


def clips_of(task: TaskConfig) -> dict[str, str]:
    """The files from which the controls are read or made, by their keys."""
    found = {}
    for name, file in controls_of(task).items():
        if file != FROM_VIDEO:
            found[f"task.controls.{name}"] = file
        elif task.video is not None:
            found["task.video"] = task.video
    return found


def controls_planned(task: TaskConfig) -> int:
    """How many controls a plan is made for; one if a transfer has none yet."""
    return max(len(controls_of(task)), 1) if task.name is TaskName.transfer else 0


def paths_of(cfg: Config) -> dict[str, str]:
    """Every path of a composition, local or on the hub, by its key."""
    task = cfg.task
    found = {f"task.{key}": getattr(task, key) for key in PATHS}
    found |= {f"task.{key}": words[1:] for key in WORDS if (words := getattr(task, key) or "").startswith("@")}
    found |= {f"task.controls.{name}": file for name, file in controls_of(task).items() if file != FROM_VIDEO}
    found |= {f"model.lora[{number}].path": one.path for number, one in enumerate(cfg.model.lora)}
    found |= {"model.path": cfg.model.path, "verify.latents": cfg.verify.latents}
    return {key: path for key, path in found.items() if path is not None}
