"""Tasks with actions: their embodiments, and the clip that follows from picture, tier and chunk size.

diffusers computes the size of such a clip once it has the picture, but a plan needs the size earlier. Source:
diffusers `pipelines/cosmos/pipeline_cosmos3_omni.py`. A test compares the tables below with the tables there.
"""

from __future__ import annotations

from dataclasses import dataclass

from cosmos3_pipeline.config.schema import TaskConfig, TaskName

ACTION_TASKS = (TaskName.policy, TaskName.forward_dynamics, TaskName.inverse_dynamics)

Size = tuple[int, int]  # height and width, in pixels

# The canvases of a tier by their ratio of height to width, in the order in which diffusers tries them.
CANVASES: dict[int, dict[float, Size]] = {
    256: {1.0: (256, 256), 0.8: (256, 320), 1.25: (320, 256), 0.6: (192, 320), 5 / 3: (320, 192)},
    480: {
        1.0: (640, 640),
        0.7391304347826086: (544, 736),
        1.3529411764705883: (736, 544),
        0.5769230769230769: (480, 832),
        1.7333333333333334: (832, 480),
    },
    704: {
        1.0: (960, 960),
        0.7647058823529411: (832, 1088),
        1.3076923076923077: (1088, 832),
        0.55: (704, 1280),
        1.8181818181818181: (1280, 704),
    },
    720: {
        1.0: (960, 960),
        0.7536231884057971: (832, 1104),
        1.3269230769230769: (1104, 832),
        0.5625: (720, 1280),
        1.7777777777777777: (1280, 720),
    },
}
VIEW_POINTS = ("ego_view", "third_person_view", "wrist_view", "concat_view")

# The columns of an action. A pose is a translation and a rotation of six numbers (Zhou et al. 2019).
POSE = (*(f"translation_{axis}" for axis in "xyz"), *(f"rotation_{number}" for number in range(6)))
ARM = (*POSE, "gripper")
FINGERTIPS = tuple(f"finger_{finger}_{axis}" for finger in range(5) for axis in "xyz")


def _of(place: str, columns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{place}_{column}" for column in columns)


_HUMANOID = (*_of("ego", POSE), *_of("first", ARM), *_of("second", ARM))


@dataclass(frozen=True)
class Embodiment:
    """One embodiment, such as a robot. `columns` is empty if diffusers tells only their number, `width`."""

    width: int
    columns: tuple[str, ...] = ()

    @classmethod
    def of(cls, columns: tuple[str, ...]) -> Embodiment:
        return cls(len(columns), columns)


EMBODIMENTS = {
    "av": Embodiment.of(POSE),
    "camera_pose": Embodiment.of(POSE),
    "pusht": Embodiment(2),
    "umi": Embodiment.of(ARM),
    "bridge_orig_lerobot": Embodiment.of(ARM),
    "droid_lerobot": Embodiment.of(ARM),
    "robomind-franka": Embodiment.of(ARM),
    "robomind-franka-dual": Embodiment.of((*_of("first", ARM), *_of("second", ARM))),
    "robomind-ur": Embodiment.of(ARM),
    "galbot": Embodiment(30),
    "agibotworld": Embodiment.of(_HUMANOID),
    "agibot_gear_gripper": Embodiment.of(_HUMANOID),
    "agibot_gear_gripper_ext": Embodiment.of(_HUMANOID),
    "fractal": Embodiment.of(ARM),
    "hand_pose": Embodiment.of(
        (*_of("ego", POSE), *_of("first", (*POSE, *FINGERTIPS)), *_of("second", (*POSE, *FINGERTIPS)))
    ),
}
# The model has weights for these embodiments, but their actions have no fixed width.
WITHOUT_WIDTH = ("libero", "no_action")


@dataclass(frozen=True)
class ActionTask:
    """The settings that only tasks with actions have. `canvas` is None until the picture is known."""

    mode: TaskName
    domain: str | None
    view_point: str
    chunk_size: int
    tier: int
    canvas: Size | None

    @property
    def width(self) -> int:
        """How many numbers one action has."""
        assert self.domain is not None
        return EMBODIMENTS[self.domain].width

    @property
    def predicts(self) -> bool:
        """Whether the task generates the actions. Otherwise they are its input."""
        return self.mode is not TaskName.forward_dynamics

    @property
    def shows(self) -> bool:
        """Whether the task makes a video."""
        return self.mode is not TaskName.inverse_dynamics

    def conditioned(self, temporal: int) -> list[int]:
        """The latent frames that are encoded from the picture or the clip and are not denoised."""
        return [0] if self.shows else list(range(self.chunk_size // temporal + 1))


def action_of(task: TaskConfig) -> ActionTask | None:
    """The action settings of a checked `task`, or None for a task without actions."""
    if task.name not in ACTION_TASKS:
        return None
    assert task.chunk_size is not None and task.view_point is not None and task.resolution_tier is not None
    canvas = None if task.canvas is None else (task.canvas[0], task.canvas[1])
    return ActionTask(task.name, task.domain, task.view_point, task.chunk_size, task.resolution_tier, canvas)


def canvas_for(picture: Size, tier: int, spatial: int) -> Size:
    """The canvas of `tier` that a picture is padded to: its ratio of height to width is the nearest."""
    height, width = _whole_rows(picture, spatial)
    return CANVASES[tier][min(CANVASES[tier], key=lambda ratio: abs(ratio - height / width))]


def content_on(canvas: Size, picture: Size, spatial: int) -> Size:
    """The part of `canvas` whose latents show `picture`, in whole latent rows and columns.

    A picture that is larger than the canvas is scaled down to fit; no picture is scaled up. A last latent row or
    column that also covers padding is left out.
    """
    height, width = _whole_rows(picture, spatial)
    scale = min(canvas[1] / width, canvas[0] / height, 1.0)
    shown = (max(1, int(scale * side + 0.5)) for side in (height, width))
    rows, cols = (max(side // spatial, 1) for side in shown)
    return rows * spatial, cols * spatial


def _whole_rows(picture: Size, spatial: int) -> Size:
    """The size that diffusers' `VideoProcessor` first resizes a picture to: whole latent rows and columns."""
    height, width = (side - side % spatial for side in picture)
    return height, width
