"""Tasks, sizes, lengths and frame rates outside a model's training: `model.trained` says if they are refused."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cosmos3_pipeline.config.schema import Config, TaskName
from cosmos3_pipeline.config.tasks import clips_of, controls_of, inputs_of
from cosmos3_pipeline.errors import Problem
from cosmos3_pipeline.planning.actions import action_of
from cosmos3_pipeline.planning.geometry import chunks_of
from cosmos3_pipeline.planning.text import prompts_of


def outside(cfg: Config) -> Iterator[Problem]:
    """Problems of a clip that the model was not trained for; none if the model lists no tiers."""
    task, trained = cfg.task, cfg.model.trained
    tiers = [(tier, [_size(s) for s in tier.sizes]) for tier in trained.tiers]
    if trained.when_outside == "ignore" or not tiers:
        return
    if task.name not in trained.tasks:
        tasks = " and ".join(name.value for name in trained.tasks)
        yield Problem(
            what=f"task={task.name.value} with model={cfg.model.name}",
            why=f"NVIDIA supports {tasks} on this model",
            works=f"task={trained.tasks[0].value}, or another model",
        )
    if strange := [name for name in controls_of(task) if name not in trained.controls]:
        yield Problem(
            what=f"task.controls.{strange[0]} with model={cfg.model.name}",
            why=f"the model was trained to follow {', '.join(trained.controls) or 'no control'}",
            works=f"task.controls.{trained.controls[0]}=FILE" if trained.controls else "another model",
        )
    yield from _strange_words(cfg)
    if action_of(task) is not None:
        return  # the tier decides the size, and each dataset of actions has its frame rate
    here, frames = (task.width, task.height), chunks_of(cfg).frames
    key = "task.num_frames" if task.name is not TaskName.transfer else "task.num_video_frames_per_chunk"
    tier = next((tier for tier, sizes in tiers if here in sizes), None)
    if tier is None:
        near = min((s for _, sizes in tiers for s in sizes), key=lambda s: _distance(s, here))
        yield Problem(
            what=f"task.width={task.width} x task.height={task.height} with model={cfg.model.name}",
            why=f"the model was not trained for this size; the nearest that it was is {near[0]}x{near[1]}",
            works=f"task.width={near[0]} task.height={near[1]}",
        )
    elif frames != 1 and not tier.min_frames <= frames <= tier.max_frames:
        nearest = min(max(frames, tier.min_frames), tier.max_frames)
        step = cfg.model.vae.scale_factor_temporal
        rounded = (nearest - 1) // step * step + 1
        yield Problem(
            what=f"{key}={frames} with model={cfg.model.name}",
            why=f"at {here[0]}x{here[1]} the model was trained for {tier.min_frames} to {tier.max_frames} frames",
            works=f"{key}={rounded if rounded >= tier.min_frames else rounded + step}",
        )
    if frames != 1 and task.fps not in trained.fps:
        near_fps = min(trained.fps, key=lambda fps: abs(fps - task.fps))
        yield Problem(
            what=f"task.fps={task.fps:g} with model={cfg.model.name}",
            why=f"the model was trained for {', '.join(f'{fps:g}' for fps in trained.fps)} frames per second",
            works=f"task.fps={near_fps:g}",
        )


def words_of_another(cfg: Config) -> Iterator[Problem]:
    """A problem if the model's example prompt is used with a photograph or clip of the user."""
    task = cfg.task
    given = next((f"task.{one.key}" for one in inputs_of(task.name) if getattr(task, one.key) is not None), None)
    given = given or next(iter(clips_of(task)), None)
    if given is not None and task.prompt == cfg.model.recommended.prompt and task.prompt_file is None:
        yield Problem(
            what=f"task.prompt is the example of model={cfg.model.name}, which does not know your {given}",
            why="the words say what the whole clip shows, and win over what it begins with",
            works=f"task.prompt=... with what {given} shows and what happens then",
        )


def _strange_words(cfg: Config) -> Iterator[Problem]:
    known = cfg.model.trained.words
    if known is None:
        return
    prompts = "\n".join(prompts_of(cfg.task)).lower()
    strange = dict.fromkeys(word for word in re.findall(r"\w+", prompts) if word not in known)
    if strange:
        yield Problem(
            what=f"{'task.prompt' if cfg.task.prompt_file is None else cfg.task.prompt_file} has words that "
            f"model={cfg.model.name} does not know: {', '.join(strange)}",
            why=f"it was trained with {', '.join(known)}",
            works=f"task.prompt='{cfg.model.recommended.prompt}'",
        )


def _size(words: str) -> tuple[int, int]:
    """Width and height of `1280x720`."""
    width, _, height = words.partition("x")
    return int(width), int(height)


def _distance(size: tuple[int, int], here: tuple[int, int]) -> float:
    return abs(size[0] - here[0]) + abs(size[1] - here[1])
