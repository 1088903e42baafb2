"""Checks of a task with actions, and the keys of its clip that follow from the picture."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from typing import Any

from cosmos3_pipeline.config.schema import Config, TaskConfig, TaskName
from cosmos3_pipeline.errors import ConfigError, Problem, Refusal, did_you_mean
from cosmos3_pipeline.planning.action_files import read_actions
from cosmos3_pipeline.planning.actions import (
    ACTION_TASKS,
    CANVASES,
    EMBODIMENTS,
    VIEW_POINTS,
    WITHOUT_WIDTH,
    ActionTask,
    action_of,
    canvas_for,
    content_on,
)
from cosmos3_pipeline.planning.geometry import chunks_of
from cosmos3_pipeline.planning.pictures import clip_size, photograph_size

OF_ACTIONS = ("domain", "actions", "chunk_size", "view_point", "resolution_tier", "canvas")


def settled(cfg: Config) -> dict[str, Any]:
    """Values that follow from the picture and the actions, by dotted key; empty for a task without actions.

    If no picture is set, its size is the size in the config. If no action file is set, the clip is one chunk.

    Raises:
        ConfigError: the picture or the actions cannot be read, or the keys of the task do not fit each other.
    """
    if cfg.task.name not in ACTION_TASKS:
        return {}
    if found := [*_keys(cfg), *_sources(cfg.task)]:
        raise ConfigError(found)
    action, spatial = action_of(cfg.task), cfg.model.vae.scale_factor_spatial
    assert action is not None
    actions, picture = _actions(cfg.task, action), _picture(cfg.task)
    if min(picture) < spatial:
        raise ConfigError([_tiny(cfg.task, picture, spatial)])
    canvas = canvas_for(picture, action.tier, spatial)
    height, width = content_on(canvas, picture, spatial)
    return {
        "task.height": height,
        "task.width": width,
        "task.num_frames": actions + 1,
        "task.canvas": list(canvas),
        "task.condition_latent_frames": action.conditioned(cfg.model.vae.scale_factor_temporal),
    }


def by_hand(keys: dict[str, Any], literal: Callable[[str], Any], typed: Container[str]) -> Iterator[Problem]:
    """A problem for each of the settled `keys` that the user set to another value.

    `literal` returns the value that the user or an option set for a key, and `typed` are the keys of the command
    line. An empty list in an option is a value to be filled in.
    """
    for key, value in keys.items():
        given = literal(key)
        if given not in (None, value) and (given != [] or key in typed):
            yield Problem(
                what=f"{key}={given} with a task that has actions",
                why=f"the picture, task.resolution_tier, task.chunk_size and the actions decide it: it is {value}",
                works=f"no {key}; another task.resolution_tier or task.chunk_size makes another clip",
            )


def check_actions(cfg: Config) -> Iterator[Problem]:
    """Problems of a task with actions, and of action keys that are set with another task."""
    task, model = cfg.task, cfg.model
    if task.name not in ACTION_TASKS:
        for key in OF_ACTIONS:
            if (value := getattr(task, key)) is not None:
                yield Problem(
                    what=f"task.{key}={value} with task={task.name.value}",
                    why="only tasks with actions read it, so it would be ignored",
                    works=f"task={' or task='.join(name.value for name in ACTION_TASKS)}, or no task.{key}",
                )
        return
    if model.distilled_sigmas is not None:
        yield Problem(
            what=f"task={task.name.value} with a checkpoint distilled to {len(model.distilled_sigmas)} steps",
            why="it learned its steps for pictures alone, and diffusers has no such steps for actions",
            works="task=t2v, or a checkpoint that is not distilled, such as model=nano",
        )
    elif not model.transformer.action_gen:
        yield Problem(
            what=f"task={task.name.value} with model={model.name}, whose model.transformer.action_gen is false",
            why="it has no weights for actions",
            works="model=nano, model=edge, or model=toy_random to try it on a laptop",
        )
    else:
        yield from _too_few_weights(cfg)
    if cfg.output.against_replicated and task.name is TaskName.inverse_dynamics:
        yield Problem(
            what="output.against_replicated=true with task=inverse_dynamics",
            why="it decodes a clip again, and this task decodes none",
            works="output.against_replicated=false",
        )
    if cfg.output.against_replicated and (chunks := chunks_of(cfg)).count > 1:
        yield Problem(
            what=f"output.against_replicated=true with {chunks.total - 1} actions in {chunks.count} chunks",
            why="a second decode of every chunk would need the latents of all of them",
            works="output.against_replicated=false, or job=verify, which compares strategies on one chunk",
        )


def _too_few_weights(cfg: Config) -> Iterator[Problem]:
    task, model = cfg.task, cfg.model.transformer
    if task.domain is not None and (width := EMBODIMENTS[task.domain].width) > model.action_dim:
        yield Problem(
            what=f"task.domain={task.domain} with model.transformer.action_dim={model.action_dim}",
            why=f"an action of {task.domain} has {width} numbers",
            works="another domain, or a checkpoint with wider actions",
        )


def _keys(cfg: Config) -> Iterator[Problem]:
    """Problems of keys whose values are not in diffusers' tables."""
    task, step = cfg.task, cfg.model.vae.scale_factor_temporal
    for key, known in (("resolution_tier", tuple(CANVASES)), ("view_point", VIEW_POINTS)):
        value = getattr(task, key)
        if value not in known:
            names = [str(one) for one in known]
            yield Problem(
                what=f"task.{key}={'null' if value is None else value} with task={task.name.value}",
                why=f"the model was trained with {', '.join(names)}",
                works=did_you_mean(str(value), names, otherwise=f"task.{key}={names[1]}"),
            )
    if task.chunk_size is None or task.chunk_size % step:
        chunk = task.chunk_size or 0
        yield Problem(
            what=f"task.chunk_size={'null' if task.chunk_size is None else chunk} with task={task.name.value}",
            why=f"the clip has one frame more than there are actions, and must have {step}k + 1",
            works=f"task.chunk_size={max(round(chunk / step), 1) * step}",
        )
    yield from _domain(task)
    if task.actions is not None and task.name is not TaskName.forward_dynamics:
        yield Problem(
            what=f"task.actions={task.actions} with task={task.name.value}",
            why="the actions are what this task finds, so the file would be ignored",
            works="task=forward_dynamics, or no task.actions",
        )


def _domain(task: TaskConfig) -> Iterator[Problem]:
    domain = task.domain
    if domain is None or domain in EMBODIMENTS:
        return
    why = f"the embodiments are: {', '.join(EMBODIMENTS)}"
    if domain in WITHOUT_WIDTH:
        why = f"its actions have no fixed number of columns, so what the model says cannot be read; {why}"
    yield Problem(
        what=f"task.domain={domain}",
        why=why,
        works=did_you_mean(domain, EMBODIMENTS, otherwise="task.domain=bridge_orig_lerobot"),
    )


def _sources(task: TaskConfig) -> Iterator[Problem]:
    if task.image is not None and task.video is not None:
        yield Problem(
            what=f"task.image={task.image} and task.video={task.video}",
            why="the clip goes on from one of them",
            works="task.image=photo.jpg, or task.video=clip.mp4",
        )
    elif task.image is not None and task.name is TaskName.inverse_dynamics:
        yield Problem(
            what=f"task.image={task.image} with task=inverse_dynamics",
            why="one picture shows no motion whose actions could be found",
            works="task.video=clip.mp4, or task=policy",
        )


def _actions(task: TaskConfig, action: ActionTask) -> int:
    """The number of actions in the file; one chunk without a file, or without the domain needed to read it.

    Raises ConfigError.
    """
    if action.predicts or task.actions is None or action.domain is None:
        return action.chunk_size
    try:
        return len(read_actions(task.actions, action, task.fps))
    except Refusal as refusal:
        raise ConfigError([refusal.problem]) from refusal


def _picture(task: TaskConfig) -> tuple[int, int]:
    """Height and width in pixels of the picture that the clip begins with. Raises ConfigError."""
    try:
        if task.image is not None:
            return photograph_size(task.image)
        return clip_size(task.video) if task.video is not None else (task.height, task.width)
    except Refusal as refusal:
        raise ConfigError([refusal.problem]) from refusal


def _tiny(task: TaskConfig, picture: tuple[int, int], spatial: int) -> Problem:
    key = "image" if task.image is not None else "video"
    return Problem(
        what=f"task.{key}={getattr(task, key)} is {picture[1]}x{picture[0]} pixels",
        why=f"one latent row or column is {spatial} pixels",
        works="a larger picture",
    )
