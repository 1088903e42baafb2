"""Settings of the command line that nothing would read with the rest of the composition.

Only settings that were typed are refused, because an option or an experiment may set keys for several tasks. Two
kinds of settings are always accepted: limits that a run keeps anyway, such as `vae.required_exactness`, and
numbers that describe a machine, such as `topology.accelerator.network_gb_per_s`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cosmos3_pipeline.config.compose import Composition
from cosmos3_pipeline.config.overrides import typed_settings
from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.config.schema import Config, TaskName
from cosmos3_pipeline.config.shortcut import PlainComposition
from cosmos3_pipeline.config.tasks import CLIP, FROM_VIDEO, MADE, clips_of, controls_of, inputs_of
from cosmos3_pipeline.errors import Problem
from cosmos3_pipeline.planning.actions import ACTION_TASKS
from cosmos3_pipeline.planning.vae import directions, is_parallel
from cosmos3_pipeline.vae.program import Direction

RECOMMENDED = "model.recommended."


@dataclass(frozen=True)
class Unread:
    """Keys that nothing reads beside another setting.

    keys: a pattern of dotted keys, or of groups.
    beside: the other setting, such as `task=t2i`; None if the keys are read.
    why: why they are not read, without the end ", so it would be ignored".
    works: what would make something read them.
    """

    keys: str
    beside: Callable[[Config], str | None]
    why: str
    works: str


def _task(*names: TaskName) -> Callable[[Config], str | None]:
    return lambda cfg: f"task={cfg.task.name.value}" if cfg.task.name in names else None


def _no_clip(cfg: Config) -> str | None:
    """The task, if it reads no clip: its inputs are none, or a photograph."""
    task = cfg.task
    needs_none = CLIP not in inputs_of(task.name) or (task.name in ACTION_TASKS and task.image is not None)
    return f"task={task.name.value}" if needs_none and not clips_of(task) else None


def _no_picture(cfg: Config) -> str | None:
    return None if inputs_of(cfg.task.name) or clips_of(cfg.task) else f"task={cfg.task.name.value}"


def _no_control_made(name: str) -> Callable[[Config], str | None]:
    def beside(cfg: Config) -> str | None:
        transfers = cfg.task.name is TaskName.transfer  # `transfer_problems` refuses the key in another task
        made = not transfers or controls_of(cfg.task).get(name) == FROM_VIDEO
        return None if made else f"no task.controls.{name}=from_video"

    return beside


def _flag_off(direction: Direction) -> Callable[[Config], str | None]:
    return lambda cfg: None if is_parallel(cfg.vae, direction) else f"vae.parallel_{direction}=false"


def _never(direction: Direction) -> Callable[[Config], str | None]:
    def beside(cfg: Config) -> str | None:
        idle = is_parallel(cfg.vae, direction) and direction not in directions(cfg)
        return f"task={cfg.task.name.value}" if idle else None

    return beside


def _head_off(name: str) -> Callable[[Config], str | None]:
    key = f"{name}_gen"
    return lambda cfg: None if getattr(cfg.model.transformer, key) else f"model.transformer.{key}=false"


def _shifted(cfg: Config) -> str | None:
    shift = cfg.sampler.flow_shift
    return None if shift is None else f"sampler.flow_shift={shift:g}"


def _karras(*, used: bool) -> Callable[[Config], str | None]:
    said = f"model.schedule.use_karras_sigmas={str(used).lower()}"
    return lambda cfg: said if cfg.model.schedule.use_karras_sigmas is used else None


def _picture_given(cfg: Config) -> str | None:
    keys = [key for key in ("image", "video") if getattr(cfg.task, key) is not None]
    return f"task.{keys[0]}" if cfg.task.name in ACTION_TASKS and keys else None


def _one_rank(cfg: Config) -> str | None:
    return "one rank" if cfg.topology.nodes * cfg.topology.ranks_per_node == 1 else None


ROWS = (
    Unread(
        r"output\.(crf|preset|encoder|encoders)",
        _task(TaskName.t2i, TaskName.inverse_dynamics),
        "it is for the file of a video, and this task writes none",
        "task=t2v",
    ),
    Unread(rf"(task|{re.escape(RECOMMENDED[:-1])})\.fps", _task(TaskName.t2i), "an image has no rate", "task=t2v"),
    Unread(r"task\.condition_keep", _task(TaskName.transfer), "it takes the first frames of a clip", "task=v2v"),
    Unread(r"task\.(condition_keep|resample)", _no_clip, "no clip is read", "task=v2v with task.video=clip.mp4"),
    Unread(
        r"task\.background",
        _no_picture,
        "no picture is read that could be transparent",
        "task=i2v with task.image=photo.png",
    ),
    *(
        Unread(
            rf"task\.{key}",
            _no_control_made(name),
            "a control clip that is a file is taken as it is",
            f"task.controls.{name}=from_video with task.video=clip.mp4",
        )
        for name, key in MADE.items()
    ),
    *(
        row
        for direction in ("encode", "decode")
        for row in (
            Unread(
                rf"vae[./]{direction}(\..+)?",
                _flag_off(direction),
                f"without the flag every rank {direction}s the whole",
                f"vae.parallel_{direction}=true beside it",
            ),
            Unread(
                rf"vae\.(parallel_{direction}|{direction}\..+)",
                _never(direction),
                f"this task {direction}s nothing",
                {"encode": "task=i2v or task=v2v", "decode": "task=policy"}[direction],
            ),
        )
    ),
    Unread(
        r"model\.repo",
        lambda cfg: None if cfg.model.path is None else f"model.path={cfg.model.path}",
        "the weights come from model.path",
        "model.path with the repository",
    ),
    Unread(
        r"model\.schedule\.(use_karras_sigmas|flow_shift|sigma_min|sigma_max)",
        _shifted,
        "a run with a shift of its own has no other, and no Karras sigmas",
        "sampler.flow_shift=null",
    ),
    Unread(
        r"model\.schedule\.(flow_shift|native_grid)",
        _karras(used=True),
        "Karras sigmas have neither shift nor grid",
        "model.schedule.use_karras_sigmas=false",
    ),
    Unread(
        r"model\.schedule\.sigma_(min|max)",
        _karras(used=False),
        "only Karras sigmas have these ends",
        "model.schedule.use_karras_sigmas=true",
    ),
    Unread(
        r"model\.(transformer\.sound_(dim|latent_fps)|sound_tokenizer\.dec_dim)",
        _head_off("sound"),
        "a model without a head for sound has no such weights",
        "model.transformer.sound_gen=true",
    ),
    Unread(
        r"model\.transformer\.(action_dim|num_embodiment_domains)",
        _head_off("action"),
        "a model without weights for actions has no such dimension",
        "model.transformer.action_gen=true",
    ),
    Unread(
        r"model\.trained\.(tasks|controls|fps|words)",
        lambda cfg: "model.trained.when_outside=ignore" if cfg.model.trained.when_outside == "ignore" else None,
        "nothing is compared with the training",
        "model.trained.when_outside=warn",
    ),
    Unread(
        re.escape(RECOMMENDED) + r"action\.num_frames",
        _task(*ACTION_TASKS),
        "the clip has one frame more than there are actions",
        "task.chunk_size=N",
    ),
    Unread(
        re.escape(RECOMMENDED) + r"action\.(height|width)",
        _picture_given,
        "the picture and task.resolution_tier decide the size",
        "another task.resolution_tier",
    ),
    Unread(r"topology\.patience_seconds", _one_rank, "a rank alone waits for no other", "topology=cpu_x2"),
)


def unread_settings(
    cfg: Config, composition: Composition | PlainComposition, changes: Mapping[str, Any]
) -> Iterator[Problem]:
    """A problem for each typed setting of `composition` that nothing would read. `cfg` has its values."""
    for key, typed in typed_settings(composition.overrides or ()).items():
        for row in ROWS:
            if re.fullmatch(row.keys, key) and (beside := row.beside(cfg)) is not None:
                why = f"{row.why}, so it would be ignored"
                yield Problem(f"{typed} with {beside}", why, f"{row.works}, or no {key}")
                break
        else:
            if key.startswith(RECOMMENDED) and not _is_taken(key, cfg, composition, changes):
                yield _not_taken(key, typed, cfg)


def _is_taken(
    key: str, cfg: Config, composition: Composition | PlainComposition, changes: Mapping[str, Any]
) -> bool:
    """Whether another key of the composition changes with `key`."""
    value = value_of(cfg, key)
    if isinstance(value, dict):
        return True
    other = not value if isinstance(value, bool) else f"{value}." if isinstance(value, str) else (value or 0) + 1
    one, two = (plain(each) for each in (cfg, composition.typed({**changes, key: other})))
    del one["model"]["recommended"], two["model"]["recommended"]
    return one != two


def _not_taken(key: str, typed: str, cfg: Config) -> Problem:
    """The problem of a default that another setting replaces, or that is for another kind of task."""
    *_, modality, name = key.split(".")
    node = cfg.sampler if hasattr(cfg.sampler, name) else cfg.task
    taker = f"{'sampler' if node is cfg.sampler else 'task'}.{name}"
    if modality in vars(cfg.model.recommended) and modality != cfg.task.modality:
        here = f"{RECOMMENDED}{cfg.task.modality}.{name}"
        return Problem(
            f"{typed} with task={cfg.task.name.value}",
            f"it is a default of another kind of task, so it would be ignored; here {here} counts",
            f"{here}=..., or no {key}",
        )
    return Problem(
        f"{typed} with {taker}={getattr(node, name)}",
        f"it is the value of {taker} only where that is not set, so it would be ignored",
        "one of them",
    )


def value_of(cfg: Config, key: str) -> Any:
    """The value of a dotted `key` of the schema; a dict for a key that is a node."""
    value: Any = plain(cfg)
    for part in key.split("."):
        value = value[part]
    return value
