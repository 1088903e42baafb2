"""Every check of a composition, before a weight is read: structure first, then what the arithmetic says.

All problems are collected, so a user mends them in one go.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig

from cosmos3_pipeline.config import checks as structure
from cosmos3_pipeline.config.compose import compose
from cosmos3_pipeline.config.errors import ConfigError, Problem, Refusal, did_you_mean
from cosmos3_pipeline.plan.geometry import Clip, clip_of, nearest_multiple

X264_PRESETS = (
    *("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"),
    "placebo",
)


def compose_checked(overrides: Sequence[str]) -> DictConfig:
    """Compose `overrides` and check the result; raises ConfigError with every problem found."""
    cfg = compose(overrides)
    check(cfg)
    return cfg


def check(cfg: DictConfig) -> None:
    """Raise ConfigError with every problem of `cfg`; return when there is none."""
    found = structure.problems(cfg)
    if not found:  # the arithmetic needs every value to be there and in range
        clip = clip_of(cfg)
        for one in (_task, _clip, _ranks, _output):
            found.extend(one(cfg, clip))
    if found:
        raise ConfigError(found)


def check_start(cfg: DictConfig) -> None:
    """Raise ConfigError with everything that keeps a checked `cfg` from running here and now.

    A plan needs no photograph, no weights and no torchrun; a run does.
    """
    found = [*_inputs(cfg), *_world(cfg)]
    if found:
        raise ConfigError(found)


def _task(cfg: DictConfig, clip: Clip) -> Iterator[Problem]:
    task = cfg.task
    name = task.name.value
    for key, wanted_by in (("image", "i2v"), ("video", "v2v")):
        if name != wanted_by and task[key] is not None:
            yield Problem(
                what=f"task.{key}={task[key]} with task={name}",
                why=f"only {wanted_by} reads it, so it would be ignored",
                works=f"task={wanted_by}, or no task.{key}",
            )
    frames = list(task.condition_latent_frames)
    if name == "i2v" and frames != [0]:
        yield Problem(
            what=f"task.condition_latent_frames={frames} with task=i2v",
            why="a photograph is the first frame and no other",
            works="task.condition_latent_frames=[0]",
        )
    elif name == "v2v" and (not frames or min(frames) < 0 or max(frames) >= clip.latent_frames):
        yield Problem(
            what=f"task.condition_latent_frames={frames}",
            why=f"{clip.num_frames} frames are {clip.latent_frames} latent frames, numbered from 0",
            works=f"one or more of 0..{clip.latent_frames - 1}, for example [0,1]",
        )
    elif name in ("t2v", "t2i") and frames:
        yield Problem(
            what=f"task.condition_latent_frames={frames} with task={name}",
            why="there is no input to condition on, so it would be ignored",
            works="task.condition_latent_frames=[]",
        )
    if not task.prompt.strip():
        yield Problem(
            what="task.prompt is empty",
            why="the model is told what to show by words only",
            works="task.prompt='a red kite'",
        )


def _clip(cfg: DictConfig, clip: Clip) -> Iterator[Problem]:
    for key in ("height", "width"):
        value = cfg.task[key]
        if value % clip.spatial:
            yield Problem(
                what=f"task.{key}={value} is not a multiple of {clip.spatial}",
                why=f"one latent row or column is {clip.spatial} pixels",
                works=f"task.{key}={nearest_multiple(value, clip.spatial)}",
            )
    frames, step = cfg.task.num_frames, clip.temporal
    if cfg.task.name.value == "t2i":
        if frames != 1:
            yield Problem(
                what=f"task.num_frames={frames} with task=t2i",
                why="an image has one frame",
                works="task.num_frames=1, or task=t2v",
            )
    elif frames == 1:
        yield Problem(
            what=f"task.num_frames=1 with task={cfg.task.name.value}",
            why="one frame is an image, which has its own task and prompt",
            works=f"task=t2i, or task.num_frames={step + 1}",
        )
    elif (frames - 1) % step:
        yield Problem(
            what=f"task.num_frames={frames} is not {step}k + 1",
            why=f"the first latent frame is one frame, each later one {step}",
            works=f"task.num_frames={nearest_multiple(frames - 1, step) + 1}",
        )


def _ranks(cfg: DictConfig, clip: Clip) -> Iterator[Problem]:
    topology = cfg.topology
    ranks = topology.nodes * topology.ranks_per_node
    split = topology.cfg * topology.ulysses
    if ranks % split:
        yield Problem(
            what=f"topology.cfg={topology.cfg} x topology.ulysses={topology.ulysses} on {ranks} ranks",
            why=f"{ranks} ranks do not divide by {topology.cfg} x {topology.ulysses} = {split}",
            works=f"topology.ranks_per_node={nearest_multiple(ranks, split)}"
            if topology.nodes == 1
            else "axes whose product divides the ranks",
        )


def _output(cfg: DictConfig, clip: Clip) -> Iterator[Problem]:
    if cfg.output.preset not in X264_PRESETS:
        yield Problem(
            what=f"output.preset={cfg.output.preset} does not exist",
            why=f"the H.264 encoder's presets are: {', '.join(X264_PRESETS)}",
            works=did_you_mean(cfg.output.preset, X264_PRESETS, otherwise="output.preset=medium"),
        )


def _inputs(cfg: DictConfig) -> Iterator[Problem]:
    task, name = cfg.task, cfg.task.name.value
    for key, wanted_by in (("image", "i2v"), ("video", "v2v")):
        if name == wanted_by and task[key] is None:
            yield Problem(
                what=f"task.{key} is not set",
                why=f"task={name} goes on from {'a photograph' if key == 'image' else 'a clip'}",
                works=f"task.{key}={'photo.jpg' if key == 'image' else 'clip.mp4'}",
            )
    files = {f"task.{key}": cfg.task[key] for key in ("image", "video") if cfg.task[key] is not None}
    for key in ("prompt", "negative_prompt"):
        if cfg.task[key].startswith("@"):
            files[f"task.{key}"] = cfg.task[key][1:]
    for key, name in files.items():
        path = Path(name).expanduser()
        if not path.is_file():
            there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            yield Problem(
                what=f"{key}={cfg.task[key.removeprefix('task.')]} is not a file",
                why=f"{path.absolute()} does not exist" if not path.exists() else f"{path} is a folder",
                works=did_you_mean(path.name, there, otherwise="the path of a file that exists"),
            )


def _world(cfg: DictConfig) -> Iterator[Problem]:
    topology = cfg.topology
    ranks = topology.nodes * topology.ranks_per_node
    world = os.environ.get("WORLD_SIZE")
    if "RANK" in os.environ and world is not None and int(world) != ranks:
        yield Problem(
            what=f"torchrun started {world} ranks, the topology has {ranks}",
            why=f"topology.nodes={topology.nodes} x topology.ranks_per_node={topology.ranks_per_node} = {ranks}",
            works=f"topology.ranks_per_node={int(world) // topology.nodes}, or torchrun --nproc-per-node "
            f"{topology.ranks_per_node}",
        )
    if topology.nodes > 1 and "RANK" not in os.environ:
        yield Problem(
            what=f"topology.nodes={topology.nodes} without torchrun",
            why="one machine cannot start processes on another",
            works=f"on each node: torchrun --nnodes {topology.nodes} --nproc-per-node {topology.ranks_per_node} "
            "--rdzv-backend c10d --rdzv-endpoint HOST:29500 launch.py ...",
        )


def refused(action: Callable[[], object]) -> Iterator[Problem]:
    """The problem that `action` refuses with, or nothing when it does not refuse."""
    try:
        action()
    except Refusal as refusal:
        yield refusal.problem
