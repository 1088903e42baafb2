"""Checks of transfer, from the config alone. Imports no torch and opens no clip."""

from __future__ import annotations

from collections.abc import Iterator

from cosmos3_pipeline.config.schema import Config, TaskName
from cosmos3_pipeline.config.tasks import FROM_VIDEO, MADE, TRANSFER_KEYS, controls_of
from cosmos3_pipeline.errors import Problem
from cosmos3_pipeline.planning.geometry import Clip
from cosmos3_pipeline.planning.sampling import guidance_of


def transfer_problems(cfg: Config, clip: Clip) -> Iterator[Problem]:
    """Problems of the keys of transfer, and of these keys with another task."""
    if cfg.task.name is not TaskName.transfer:
        yield from _unread(cfg)
        return
    if cfg.model.distilled_sigmas is not None:
        yield Problem(
            what=f"task=transfer with model={cfg.model.name}, which is distilled",
            why="its steps were learnt without controls, and it has no guidance that would amplify them",
            works="a model that is not distilled, such as model=nano",
        )
        return
    yield from _controls(cfg)
    yield from _chunks(cfg)
    task, topology = cfg.task, cfg.topology
    passes = len(guidance_of(cfg.task, cfg.sampler).passes)
    if topology.cfg > passes:
        ranks = topology.cfg * topology.ulysses
        busy = max(count for count in range(1, passes + 1) if ranks % count == 0)
        yield Problem(
            what=f"topology.cfg={topology.cfg} with sampler.guidance_scale={cfg.sampler.guidance_scale} and "
            f"task.control_guidance={task.control_guidance}",
            why=f"a step then has {'one pass' if passes == 1 else 'two passes'} only, so a rank would do nothing",
            works=f"topology.cfg={busy} topology.ulysses={ranks // busy}, or both scales above 1.0",
        )
    if cfg.output.against_replicated:
        yield Problem(
            what="output.against_replicated=true with task=transfer",
            why="a second decode of every chunk would need the latents of all of them",
            works="no output.against_replicated; vae strategies are compared by job=verify with another task",
        )


def _unread(cfg: Config) -> Iterator[Problem]:
    task, name = cfg.task, cfg.task.name.value
    found = {f"task.controls.{control}": file for control, file in controls_of(task).items()}
    keys = (*TRANSFER_KEYS, "control_guidance_interval")
    found |= {f"task.{key}": getattr(task, key) for key in keys if getattr(task, key) is not None}
    if cfg.output.control:
        found["output.control"] = "true"
    for key, value in found.items():
        yield Problem(
            what=f"{key}={value} with task={name}",
            why="only transfer reads it, so it would be ignored",
            works=f"task=transfer, or no {key}",
        )
    if task.num_frames is None:
        yield Problem(
            what=f"task.num_frames=null with task={name}",
            why="only transfer has a clip that says how long the video is",
            works="task.num_frames=17",
        )


def _controls(cfg: Config) -> Iterator[Problem]:
    task, controls = cfg.task, controls_of(cfg.task)
    made = [name for name, file in controls.items() if file == FROM_VIDEO]
    for name in made:
        key = f"task.controls.{name}"
        if name not in MADE:
            yield Problem(
                what=f"{key}=from_video",
                why=f"OpenCV makes edges and blur; {name} is what another model sees in the video",
                works=f"{key}=FILE with such a clip",
            )
        elif task.video is None:
            yield Problem(
                what=f"{key}=from_video without task.video",
                why="there is no clip of which it could be made",
                works=f"task.video=clip.mp4, or {key}=FILE",
            )
    given = task.num_first_chunk_conditional_frames
    if given and task.video is None:
        yield Problem(
            what=f"task.num_first_chunk_conditional_frames={given} without task.video",
            why="they are the first frames of that clip",
            works="task.video=clip.mp4, or task.num_first_chunk_conditional_frames=0",
        )
    if task.video is not None and not made and not given:
        yield Problem(
            what=f"task.video={task.video} with task=transfer and no control from_video",
            why="no control is made of it and the first chunk does not begin with it, so it would be ignored",
            works="task.controls.edge=from_video, or task.num_first_chunk_conditional_frames=1, or no task.video",
        )


def _chunks(cfg: Config) -> Iterator[Problem]:
    task = cfg.task
    for key in TRANSFER_KEYS:
        if getattr(task, key) is None:
            yield Problem(
                what=f"task.{key}=null with task=transfer",
                why="transfer needs a value",
                works=f"no task.{key}, which leaves what conf/task/transfer.yaml says",
            )
            return
    frames, overlap = task.num_video_frames_per_chunk or 0, task.num_conditional_frames or 0
    if overlap >= frames:
        yield Problem(
            what=f"task.num_conditional_frames={overlap} with task.num_video_frames_per_chunk={frames}",
            why="a chunk that begins with so many frames of the one before makes no new ones",
            works=f"task.num_conditional_frames=1, or {frames - 1} at most",
        )
    given, first = task.num_first_chunk_conditional_frames or 0, min(frames, task.num_frames or frames)
    longer = (task.num_frames or frames + 1) > frames
    if given >= first > 1:
        yield Problem(
            what=f"task.num_first_chunk_conditional_frames={given} with a first chunk of {first} frames",
            why="nothing of a chunk is left to make when all of its frames are given",
            works=f"task.num_first_chunk_conditional_frames={first - 1} at most"
            + (", or a larger task.num_video_frames_per_chunk" if longer else ""),
        )
    if task.num_frames == 1:
        yield Problem(
            what="task.num_frames=1 with task=transfer",
            why="one frame is an image, and controls are followed through a clip",
            works="task.num_frames=5, or task=t2i",
        )
