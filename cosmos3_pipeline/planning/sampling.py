"""The guidance passes that each sampler step computes, and the checks of the sampler's settings."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from cosmos3_pipeline.checkpoint.schedule import TRAIN_TIMESTEPS, timesteps_of
from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.config.schema import CacheConfig, CacheName, Config, SamplerConfig, TaskConfig, TaskName
from cosmos3_pipeline.config.tasks import controls_planned
from cosmos3_pipeline.denoise.cost import PassTokens
from cosmos3_pipeline.denoise.guidance import COND, NO_CONTROL, UNCOND, Guidance
from cosmos3_pipeline.errors import Problem
from cosmos3_pipeline.planning.geometry import Clip, stretches_of


def caches(cfg: Config) -> bool:
    """Whether a cache may spare passes. Which passes it spares depends on the latents."""
    return cfg.sampler.cache.name is not CacheName.none


def skipping(cfg: Config) -> tuple[str, ...]:
    """The overrides with which this run skips passes, as on a command line."""
    intervals = {
        "sampler.guidance_interval": cfg.sampler.guidance_interval,
        "task.control_guidance_interval": cfg.task.control_guidance_interval,
    }
    found = [
        f"{key}=[{low:g},{high:g}]" for key, interval in intervals.items() if interval for low, high in [interval]
    ]
    return (*found, f"sampler/cache={cfg.sampler.cache.name.value}") if caches(cfg) else tuple(found)


def with_every_pass(cfg: Config) -> Config:
    """`cfg` without the settings that `skipping` names."""
    sampler = replace(cfg.sampler, cache=CacheConfig(), guidance_interval=None)
    return replace(cfg, sampler=sampler, task=replace(cfg.task, control_guidance_interval=None))


def guidance_of(task: TaskConfig, sampler: SamplerConfig) -> Guidance:
    """The guidance passes of a run."""
    if task.name is TaskName.transfer:
        controls = task.control_guidance or 1.0
        intervals = sampler.guidance_interval, task.control_guidance_interval
        return Guidance.of_controls(sampler.guidance_scale, controls, *intervals)
    return Guidance.of_prompt(sampler.guidance_scale, sampler.guidance_interval)


def passes_of(cfg: Config, text_tokens: tuple[int, int], chunk: int = 0) -> list[PassTokens]:
    """The tokens of each guidance pass in `chunk`. `text_tokens` are for the prompt and the negative prompt."""
    stretches, (prompt, negative) = stretches_of(cfg, chunk), text_tokens
    alone = stretches[controls_planned(cfg.task) :]
    return [
        PassTokens(
            prompt if one.prompt == COND else negative,
            stretches if one.controls else alone,
            negative=one.prompt == UNCOND,
        )
        for one in guidance_of(cfg.task, cfg.sampler).passes
    ]


def passes_of_steps(cfg: Config) -> tuple[tuple[int, ...], ...]:
    """The numbers of the passes that each step has, see `Guidance`."""
    guidance = guidance_of(cfg.task, cfg.sampler)
    return tuple(guidance.at(timestep) for timestep in _timesteps(cfg))


def _timesteps(cfg: Config) -> tuple[float, ...]:
    if cfg.model.distilled_sigmas is not None:
        return tuple(sigma * TRAIN_TIMESTEPS for sigma in cfg.model.distilled_sigmas)
    return timesteps_of(_schedule(cfg), cfg.sampler.steps)


def _schedule(cfg: Config) -> dict[str, Any]:
    schedule = plain(cfg.model.schedule)
    if cfg.sampler.flow_shift is not None:  # Karras sigmas have no shift, see `Sampler.settings_for`
        schedule |= {"use_karras_sigmas": False, "flow_shift": cfg.sampler.flow_shift}
    return schedule


def check_steps(cfg: Config, clip: Clip) -> Iterator[Problem]:
    """A problem if so many steps are asked for that the first two have the same timestep.

    diffusers' `UniPCMultistepScheduler.index_for_timestep` finds a step by its timestep. It takes the second of
    two equal timesteps, so the first step would be taken for the second.
    """
    schedule, steps = _schedule(cfg), cfg.sampler.steps
    if cfg.model.distilled_sigmas is not None or not begins_twice(schedule, steps):
        return
    most = bisect_left(range(1, steps), True, key=lambda fewer: begins_twice(schedule, fewer))
    said = "model.schedule.use_karras_sigmas=true"
    if not schedule["use_karras_sigmas"]:
        owner = "sampler" if cfg.sampler.flow_shift is not None else "model.schedule"
        said = f"{owner}.flow_shift={schedule['flow_shift']}"
    yield Problem(
        what=f"sampler.steps={steps} with {said}",
        why=f"its first two steps have the same timestep, a whole number up to {TRAIN_TIMESTEPS}, and diffusers' "
        "scheduler, which finds its place by it, would break off at the last step",
        works=f"sampler.steps={most}, or fewer; or a smaller sampler.flow_shift",
    )


def begins_twice(schedule: Mapping[str, Any], steps: int) -> bool:
    return steps > 1 and len(set(timesteps_of(schedule, steps)[:2])) == 1


def check_interval(cfg: Config, clip: Clip) -> Iterator[Problem]:
    """Problems of the guidance intervals. The interval of control guidance is read by transfer only."""
    task, sampler = cfg.task, cfg.sampler
    scale = "sampler.guidance_scale", sampler.guidance_scale
    yield from _interval(cfg, "sampler.guidance_interval", sampler.guidance_interval, scale, UNCOND)
    if task.name is TaskName.transfer and task.control_guidance is not None:
        scale = "task.control_guidance", task.control_guidance
        yield from _interval(
            cfg, "task.control_guidance_interval", task.control_guidance_interval, scale, NO_CONTROL
        )


def _interval(
    cfg: Config, key: str, interval: list[float] | None, scale: tuple[str, float], name: str
) -> Iterator[Problem]:
    """Problems of the `interval` of a guidance pass.

    The name of the pass begins with `name`. A run has the pass if `scale`, a key and its value, is high enough.
    """
    if interval is None:
        return
    what = f"{key}={interval}"
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= TRAIN_TIMESTEPS:
        yield Problem(
            what=what,
            why=f"it is the lowest and the highest timestep with guidance, of those from 0 to {TRAIN_TIMESTEPS}",
            works=f"{key}=[400,1000], or null for guidance in every step",
        )
        return
    passes = guidance_of(cfg.task, cfg.sampler).passes
    number = next((number for number, one in enumerate(passes) if one.name.startswith(name)), None)
    if cfg.model.distilled_sigmas is not None:
        yield Problem(
            what=f"{what} with a checkpoint distilled to {len(cfg.model.distilled_sigmas)} steps",
            why="these steps have no guidance, so it would be ignored",
            works=f"no {key}",
        )
    elif number is None:
        yield Problem(
            what=f"{what} with {scale[0]}={scale[1]}",
            why="at that scale no step has a pass that it could leave out, so it would be ignored",
            works=f"no {key}, or a higher {scale[0]}",
        )
    elif not any(number in passes for passes in passes_of_steps(cfg)):
        timesteps = _timesteps(cfg)
        yield Problem(
            what=f"{what} with {len(timesteps)} steps",
            why=f"no step lies in it: their timesteps are {', '.join(f'{t:g}' for t in timesteps[:3])} ... "
            f"{timesteps[-1]:g}",
            works=f"{scale[0]}=1.0 for no guidance, or a wider interval",
        )


def check_cache(cfg: Config, clip: Clip) -> Iterator[Problem]:
    """Problems of cache settings that would be ignored, or that leave no pass to spare."""
    cache, steps = cfg.sampler.cache, cfg.sampler.steps
    if not caches(cfg):
        default = CacheConfig()
        for field in fields(cache):
            if getattr(cache, field.name) != getattr(default, field.name):
                yield Problem(
                    what=f"sampler.cache.{field.name}={getattr(cache, field.name)} with sampler/cache=none",
                    why="without a cache nothing reads it, so it would be ignored",
                    works=f"sampler/cache=seacache, or no sampler.cache.{field.name}",
                )
        return
    computed = max(cache.retention_steps, 1) + cache.cache_end_steps  # the first step has none to compare with
    if computed >= steps:
        yield Problem(
            what=f"sampler/cache=seacache with sampler.steps={steps}, sampler.cache.retention_steps="
            f"{cache.retention_steps} and sampler.cache.cache_end_steps={cache.cache_end_steps}",
            why="all steps are then computed, so nothing could be spared",
            works=f"sampler.steps={computed + 1} or more, or sampler/cache=none",
        )
    if not any(one.modality == "vision" and one.noisy(0, one.tokens) for one in stretches_of(cfg)):
        yield Problem(
            what=f"sampler/cache=seacache with task={cfg.task.name.value}",
            why="the cache compares the frames that are denoised, and here all frames are given",
            works="sampler/cache=none",
        )
