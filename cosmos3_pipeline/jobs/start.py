"""What keeps a checked composition from running here and now: inputs, weights, ranks. Imports no torch.

A plan needs no photograph, no weights and no torchrun; a run does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from cosmos3_pipeline.checkpoint.adopt import adopt_checkpoint
from cosmos3_pipeline.checkpoint.hub import fetch_checkpoint, is_hub_id
from cosmos3_pipeline.config.schema import Device, JobName
from cosmos3_pipeline.distributed import host
from cosmos3_pipeline.errors import ConfigError, Problem, Refusal, did_you_mean
from cosmos3_pipeline.plan.checks import check
from cosmos3_pipeline.plan.plan import make_plan
from cosmos3_pipeline.plan.units import quantity


def check_start(cfg: DictConfig) -> None:
    """Raise ConfigError with everything that keeps the checked `cfg` from running on this machine.

    A hub id is fetched once nothing else is wrong; `cfg.model.commit` is then what all ranks open.
    """
    if cfg.job.name == JobName.plan:
        return
    found = list(_world(cfg))
    if cfg.job.name != JobName.bench:  # whose VAE is random, and which makes no clip
        found += [*_inputs(cfg), *_checkpoint(cfg), *_memory(cfg)]
        if not found:
            found += _fetch(cfg)
    if found:
        raise ConfigError(found)


def _checkpoint(cfg: DictConfig) -> Iterator[Problem]:
    model = cfg.model
    if model.path is None and model.repo is not None:  # the toy model has none: it is made on the spot
        yield Problem(
            what=f"model.path is not set with model={model.name}",
            why=f"{model.name} is a real checkpoint, and its weights have to be somewhere",
            works=f"model.path=FOLDER with a diffusers folder, model.path={model.repo} with internet, "
            "or model=toy",
        )


def _fetch(cfg: DictConfig) -> Iterator[Problem]:
    """Fetch the checkpoint of a hub id; what keeps it from being had, or from running by its own dimensions."""
    model = cfg.model
    if model.path is None or not is_hub_id(model.path):
        return
    try:
        model.commit = fetch_checkpoint(model.path, model.commit or model.revision).commit
        adopted = adopt_checkpoint(cfg)
    except Refusal as refusal:
        yield refusal.problem
        return
    if adopted is not None and adopted.changed:
        check(cfg)
        yield from _memory(cfg)


def _memory(cfg: DictConfig) -> Iterator[Problem]:
    """Weights and activations that the accelerator, or the memory of this machine, cannot hold."""
    plan = make_plan(cfg)
    limit, owner = plan.accelerator.memory_bytes, f"one {plan.accelerator.name} has"
    if cfg.topology.device == Device.cpu:
        limit = host.available_bytes() / cfg.topology.ranks_per_node
        owner = "this machine has for each rank, beside what runs on it now,"
    if plan.peak_bytes <= limit:
        return
    weights = max(sum(rank.weight_bytes.values()) for rank in plan.ranks)
    needed = quantity("bytes", plan.peak_bytes)
    yield Problem(
        what=f"model={cfg.model.name} needs {needed} on a rank of topology.nodes={cfg.topology.nodes} x "
        f"topology.ranks_per_node={cfg.topology.ranks_per_node}, which does not fit by "
        f"{quantity('bytes', plan.peak_bytes - limit)}",
        why=f"{owner} {quantity('bytes', limit)}; the weights alone are {quantity('bytes', weights)}",
        works="a smaller clip, or more ranks on topology.ulysses"
        if weights < limit
        else "a smaller model, or a device with more memory: every rank holds the whole transformer",
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
    if task.prompt_file is not None:
        files["task.prompt_file"] = task.prompt_file
    for key in ("prompt", "negative_prompt"):
        if (cfg.task[key] or "").startswith("@"):
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
