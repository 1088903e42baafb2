"""From a composition to the config and the plan that the ranks get. Imports no torch.

A run needs its photographs, weights and torchrun; a plan does not. Files that the config names must exist for
both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cosmos3_pipeline.checkpoint.adopt import Adopted
from cosmos3_pipeline.checkpoint.hub import HubCheckpoint, components_for, fetch_checkpoint, is_hub_id
from cosmos3_pipeline.checkpoint.lora import with_hash
from cosmos3_pipeline.config.compose import Composition
from cosmos3_pipeline.config.schema import Config, Device, JobName, TaskConfig, TaskName
from cosmos3_pipeline.config.shortcut import PlainComposition
from cosmos3_pipeline.config.tasks import GIVEN, WORDS, clips_of, controls_of, paths_of
from cosmos3_pipeline.distributed import host
from cosmos3_pipeline.distributed.machine import can_wait
from cosmos3_pipeline.distributed.world import NO_WORLD, world_problems
from cosmos3_pipeline.errors import ConfigError, Problem, Refusal, did_you_mean
from cosmos3_pipeline.jobs.action_inputs import check_action_inputs
from cosmos3_pipeline.jobs.objective import check_objective
from cosmos3_pipeline.jobs.origin import Origin, origin_of
from cosmos3_pipeline.jobs.paths import with_whole_paths
from cosmos3_pipeline.jobs.rehearsable import check_rehearse
from cosmos3_pipeline.jobs.verify import Verification, check_verify
from cosmos3_pipeline.planning.actions import action_of
from cosmos3_pipeline.planning.checks import check_composition, refused
from cosmos3_pipeline.planning.fitting import that_fits
from cosmos3_pipeline.planning.geometry import encoded_of
from cosmos3_pipeline.planning.plan import Plan
from cosmos3_pipeline.planning.units import quantity

SMALL_MACHINE = 64  # threads per rank that are allowed on every machine


@dataclass(frozen=True)
class Prepared:
    """A composition that can start on this machine now. All fields but `adopted` are plain data for the ranks.

    verification: the strategies that job=verify compares. origin: the origin of a run; a plan has none.
    """

    config: Config
    plan: Plan
    adopted: Adopted | None = None
    verification: Verification | None = None
    origin: Origin | None = None


def prepare(composition: Composition | PlainComposition, *, fetch: bool = True) -> Prepared:
    """Check `composition` and plan it. Raises ConfigError with all reasons why it cannot run on this machine.

    A hub id is fetched after all other checks. All ranks then open `config.model.commit`.
    With `fetch` False nothing is fetched, and GPUs and encoder are not looked for. A sweep uses it to check all
    its jobs before the first job starts, because the jobs may run on other machines.
    """
    checked = check_composition(composition)
    lengths = _lengths(checked.config.task)
    if lengths:
        checked = check_composition(composition, lengths)
    prepared = Prepared(checked.config, checked.plan(), checked.adopted)
    job = checked.config.job.name
    _raise([*check_objective(prepared.config), *check_rehearse(prepared.config)])
    if job == JobName.rehearse:
        _raise([*_inputs(prepared.config)])  # it reads no weights, and the config is for another machine
        _raise([*_contents(prepared)])
    elif job == JobName.plan:
        _raise([*_files(prepared.config)])  # a plan needs no file, but files that are named must exist
    else:
        _raise(_problems(prepared))
        _raise([*_contents(prepared)])
        if fetch:
            _raise([*_accelerators(prepared.config), *_encoder(prepared.config)])
            prepared = _with_hashes(_with_checkpoint(prepared, composition, lengths))
    origin = None if job == JobName.plan else origin_of(composition.overrides)
    verification = check_verify(prepared.config)
    config = with_whole_paths(prepared.config)
    return replace(prepared, config=config, verification=verification, origin=origin)


def _problems(prepared: Prepared) -> list[Problem]:
    cfg = prepared.config
    return [*_world(cfg), *_threads(cfg), *_inputs(cfg), *_checkpoint(cfg), *_memory(prepared)]


def _with_checkpoint(
    prepared: Prepared, composition: Composition | PlainComposition, changes: Mapping[str, Any]
) -> Prepared:
    """`prepared` with the commit of a hub id, which is fetched to this machine.

    If the checkpoint was not here before, its numbers were unknown. `composition` is then checked and planned
    again, with `changes`.
    """
    fetched = _fetched(prepared.config)
    if fetched is None:
        return prepared
    model = prepared.config.model
    if prepared.adopted is not None and prepared.adopted.checkpoint.folder == fetched.folder:
        return replace(prepared, config=replace(prepared.config, model=replace(model, commit=fetched.commit)))
    checked = check_composition(composition, {**changes, "model.commit": fetched.commit})
    prepared = Prepared(checked.config, checked.plan(), checked.adopted)
    _raise([*_memory(prepared)])
    return prepared


def _with_hashes(prepared: Prepared) -> Prepared:
    """`prepared` with the SHA-256 of each adapter. The run records it, and a rank with another file stops."""
    try:
        named = [with_hash(one, number) for number, one in enumerate(prepared.config.model.lora)]
    except Refusal as refusal:
        raise ConfigError([refusal.problem]) from refusal
    model = replace(prepared.config.model, lora=named)
    return replace(prepared, config=replace(prepared.config, model=model))


def _raise(found: list[Problem]) -> None:
    if found:
        raise ConfigError(found)


def _checkpoint(cfg: Config) -> Iterator[Problem]:
    model = cfg.model
    if model.path is None and model.repo is not None:  # without a repo it is a toy model, made on this machine
        yield Problem(
            what=f"model.path is not set with model={model.name}",
            why=f"{model.name} is a real checkpoint, and its weights have to be somewhere",
            works=f"model.path=FOLDER with a diffusers folder, model.path={model.repo} with internet, "
            "or model=toy",
        )


def _fetched(cfg: Config) -> HubCheckpoint | None:
    """Fetch the checkpoint of a hub id. None if `model.path` is no hub id. Raises ConfigError."""
    model = cfg.model
    if model.path is None or not is_hub_id(model.path):
        return None
    try:
        return fetch_checkpoint(
            model.path, model.commit or model.revision, components=components_for(sound=cfg.task.sound)
        )
    except Refusal as refusal:
        raise ConfigError([refusal.problem]) from refusal


def _memory(prepared: Prepared) -> Iterator[Problem]:
    """Weights and activations that do not fit into the accelerator, or into the memory of this machine."""
    cfg, plan = prepared.config, prepared.plan
    waiting = max(rank.host_bytes for rank in plan.ranks) * cfg.topology.ranks_per_node
    if waiting > host.available_bytes():
        yield Problem(
            what=f"weights.placement={plan.weights.placement.value}: the layers that wait on this host need "
            f"{quantity('bytes', waiting)} of its memory",
            why=f"{quantity('bytes', host.available_bytes())} are free here, for "
            f"{cfg.topology.ranks_per_node} ranks with layers of their own",
            works="weights=sharded, or more weights.resident_layers, or fewer ranks on one host",
        )
    limit, owner = plan.accelerator.memory_bytes, f"one {plan.accelerator.name} has"
    if cfg.topology.device == Device.cpu:
        limit = host.available_bytes() / cfg.topology.ranks_per_node
        owner = "this machine has for each rank, beside what runs on it now,"
    if plan.peak_bytes <= limit:
        return
    needed = quantity("bytes", plan.peak_bytes)
    peak = max((stage for rank in plan.ranks for stage in rank.stages.items()), key=lambda s: s[1].peak_bytes)
    yield Problem(
        what=f"model={cfg.model.name} needs {needed} on a rank of topology.nodes={cfg.topology.nodes} x "
        f"topology.ranks_per_node={cfg.topology.ranks_per_node}, which does not fit by "
        f"{quantity('bytes', plan.peak_bytes - limit)}",
        why=f"{owner} {quantity('bytes', limit)}; most is needed to {peak[0]}: "
        f"{quantity('bytes', peak[1].weight_bytes)} of weights, "
        f"{quantity('bytes', peak[1].activation_bytes)} of activations",
        works=that_fits(cfg, limit) or "a smaller clip, more ranks on topology.ulysses, or a smaller model",
    )


def _encoder(cfg: Config) -> Iterator[Problem]:
    """The video encoder of the run, if this machine does not have it."""
    if cfg.job.name == JobName.generate and cfg.task.modality != "image":
        from cosmos3_pipeline.stages.media import check_encoder

        yield from refused(lambda: check_encoder(cfg.output.encoder))


def _accelerators(cfg: Config) -> Iterator[Problem]:
    """Missing GPUs for the ranks of this machine."""
    if cfg.topology.device == Device.cpu:
        return
    from cosmos3_pipeline.distributed.device import gpu  # imports torch, which the run needs anyway

    try:
        gpu(cfg.topology.ranks_per_node - 1)
    except Refusal as refusal:
        yield refusal.problem


def _inputs(cfg: Config) -> Iterator[Problem]:
    task = cfg.task
    for given in GIVEN[task.name]:
        if getattr(task, given.key) is None:
            yield Problem(
                what=f"task.{given.key} is not set",
                why=f"task={task.name.value} is given {given.what}",
                works=f"task.{given.key}={given.example}",
            )
    yield from check_action_inputs(cfg)
    yield from _files(cfg)
    if task.name is TaskName.transfer and not controls_of(task):
        yield Problem(
            what="task=transfer without a control",
            why="there is nothing that the video could follow",
            works="task.controls.edge=edges.mp4, or task.video=clip.mp4 task.controls.edge=from_video",
        )


def _files(cfg: Config) -> Iterator[Problem]:
    """Files that the config names and that do not exist."""
    files = {key: file for key, file in paths_of(cfg).items() if key.startswith("task.")}
    if cfg.job.name is not JobName.plan:
        files.pop("task.actions", None)  # see `check_action_inputs`
    words = {key for key in files if key.removeprefix("task.") in WORDS}
    for key, file in files.items():
        path = Path(file).expanduser()
        if not path.is_file():
            folder = path if path.is_dir() else path.parent
            there = sorted(p.name for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
            inside = f"a file in it, such as {path / there[0]}" if path.is_dir() and there else None
            kind = "is a folder" if path.is_dir() else "is no regular file"
            yield Problem(
                what=f"{key}={'@' * (key in words)}{file} is not a file",
                why=f"{path.absolute()} {kind if path.exists() else 'does not exist'}",
                works=inside or did_you_mean(path.name, there, otherwise="the path of a file that exists"),
            )


def _lengths(task: TaskConfig) -> dict[str, Any]:
    """The default number of frames of a transfer: that of its first control clip, if the clip is on this machine.

    Raises ConfigError for a clip that cannot be read.
    """
    clips = [Path(file).expanduser() for file in clips_of(task).values()]
    if task.name is not TaskName.transfer or task.num_frames is not None or not clips or not clips[0].is_file():
        return {}
    from cosmos3_pipeline.stages.controls import length_of

    try:
        return {"task.num_frames": length_of(task)}
    except Refusal as refusal:
        raise ConfigError([refusal.problem]) from refusal


def _contents(prepared: Prepared) -> Iterator[Problem]:
    """Words, pictures and clips that cannot be used, found before a folder is made and a rank starts."""
    from cosmos3_pipeline.stages import controls, inputs, words  # slow: they import decoders of pictures

    task, clip = prepared.config.task, prepared.plan.clip
    checks: list[Callable[[], object]] = []
    if task.prompt_file is not None:
        checks.append(partial(words.read_lines, task.prompt_file))
    else:
        checks.append(partial(words.prompt_of, task))
    if task.negative_prompt is not None:
        checks.append(partial(words.read_words, task.negative_prompt))
    if action_of(task) is not None:
        checks.append(partial(inputs.observation, task, encoded_of(prepared.config).num_frames, clip.temporal))
    elif task.last_image is not None:
        checks.append(partial(inputs.both_ends, task, clip))
    elif task.image is not None:
        checks.append(partial(inputs.photograph, task, clip))
    elif task.name is TaskName.transfer:
        yield from controls.control_problems(task)
    elif task.video is not None:
        checks.append(partial(inputs.condition_frames, task, clip))
    for check in checks:
        yield from refused(check)


def _threads(cfg: Config) -> Iterator[Problem]:
    """Too many threads, which would wait for each other. A few more threads than processors do no harm."""
    threads, here = cfg.topology.threads_per_rank, os.cpu_count() or 1
    if threads > max(here, SMALL_MACHINE):
        yield Problem(
            what=f"topology.threads_per_rank={threads}",
            why=f"this machine has {here} processors",
            works=f"topology.threads_per_rank={max(here // cfg.topology.ranks_per_node, 1)}",
        )


def _world(cfg: Config) -> Iterator[Problem]:
    topology = cfg.topology
    ranks = topology.nodes * topology.ranks_per_node
    broken = [*world_problems(os.environ)]
    yield from broken
    if "RANK" in os.environ and not broken and (world := int(os.environ["WORLD_SIZE"])) != ranks:
        yield Problem(
            what=f"torchrun started {world} ranks, the topology has {ranks}",
            why=f"topology.nodes={topology.nodes} x topology.ranks_per_node={topology.ranks_per_node} = {ranks}",
            works=f"topology.ranks_per_node={max(world // topology.nodes, 1)}, or torchrun --nproc-per-node "
            f"{topology.ranks_per_node}; {NO_WORLD}",
        )
    if ranks > 1 and not can_wait():
        yield Problem(
            what=f"{ranks} ranks on a machine that forbids the system call poll",
            why="ranks find each other by torch's store, whose connections wait with poll",
            works="topology=cpu_x1, or a container whose seccomp profile allows poll, as Docker's own does",
        )
    if topology.nodes > 1 and "RANK" not in os.environ:
        yield Problem(
            what=f"topology.nodes={topology.nodes} without torchrun",
            why="one machine cannot start processes on another",
            works=f"on each node: torchrun --nnodes {topology.nodes} --nproc-per-node {topology.ranks_per_node} "
            "--rdzv-backend c10d --rdzv-endpoint HOST:29500 launch.py ...",
        )
