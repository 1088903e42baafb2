"""Suggestions for a plan that does not fit: another placement, another VAE strategy, or a smaller clip."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import product

from cosmos3_pipeline.config.schema import Config, Device, Placement, TaskName
from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.planning.actions import action_of
from cosmos3_pipeline.planning.geometry import chunks_of, replica_ranks
from cosmos3_pipeline.planning.plan import make_plan
from cosmos3_pipeline.vae.plugins import REFERENCE, discover
from cosmos3_pipeline.vae.strategy import Exactness, OwnRunner

# Largest difference of log(width / height) between a suggested size and the size that was asked for.
SAME_RATIO = 0.1


def that_fits(cfg: Config, limit: float) -> str | None:
    """The fewest overrides with which `cfg` needs at most `limit` bytes on each rank; None if there are none.

    If no placement and no strategy fits, a shorter or smaller clip is suggested.
    """
    for (placement, weights), (strategy, vae) in sorted(
        product(_placements(cfg), _decodes(cfg)), key=lambda pair: bool(pair[0][0]) + bool(pair[1][0])
    ):
        if not placement and not strategy:
            continue
        try:
            plan = make_plan(replace(cfg, weights=weights.weights, vae=vae.vae))
        except Refusal:
            continue
        if plan.peak_bytes <= limit:
            return " ".join(filter(None, (placement, strategy)))
    for smaller, (placement, weights) in product(_smaller(cfg), _placements(cfg)):
        words = [placement, *(f"task.{key}={value}" for key, value in smaller.items())]
        with suppress(Refusal):
            task = replace(cfg.task, **smaller)  # type: ignore[arg-type]
            if make_plan(replace(weights, task=task)).peak_bytes <= limit:
                return " ".join(filter(None, words))
    return None


def _smaller(cfg: Config) -> list[dict[str, int]]:
    """Changes of the task to shorter clips and to the model's smaller sizes. The most pixels come first."""
    task, step = cfg.task, cfg.model.vae.scale_factor_temporal
    if action_of(task) is not None:
        return []  # the picture decides the size
    # The memory of a clip in chunks depends on the length of a chunk.
    key = "num_video_frames_per_chunk" if task.name is TaskName.transfer else "num_frames"
    asked_frames = chunks_of(cfg).frames
    lengths, chunks = [asked_frames], (asked_frames - 1) // step
    while (chunks := chunks // 2) > max(task.condition_latent_frames, default=0):
        lengths.append(step * chunks + 1)
    trained = {size for tier in cfg.model.trained.tiers for size in tier.sizes}
    sizes = [(task.width, task.height)]
    for width, height in (map(int, size.split("x")) for size in sorted(trained)):
        alike = abs(math.log(width / height * task.height / task.width)) < SAME_RATIO
        if width * height < task.width * task.height and alike:
            sizes.append((width, height))
    found = []
    for (width, height), frames in product(sizes, lengths):
        changes = {"width": width, "height": height, key: frames}
        found.append({key: value for key, value in changes.items() if value != getattr(task, key)})
    asked = {"width": task.width, "height": task.height, key: asked_frames}
    return sorted(found[1:], key=lambda changes: (-math.prod((asked | changes).values()), len(changes)))


def _placements(cfg: Config) -> Iterator[tuple[str, Config]]:
    """Pairs of an override and the config with it. The override is "" for the placement of `cfg` itself."""
    yield "", cfg
    # On an accelerator the plan knows the free memory, so `auto` can choose.
    streamed = Placement.streamed if cfg.topology.device is Device.cpu else Placement.auto
    for placement in (Placement.sharded, streamed):
        if placement is Placement.sharded and replica_ranks(cfg.topology) == 1:
            continue
        stay = None if placement is Placement.auto else 0
        weights = replace(cfg.weights, placement=placement, resident_layers=stay)
        yield f"weights={placement.value}", replace(cfg, weights=weights)


def _decodes(cfg: Config) -> Iterator[tuple[str, Config]]:
    """The same as `_placements`, for the decode strategies that are exact enough for `cfg`."""
    yield "", cfg
    found = discover()
    required = Exactness(cfg.vae.required_exactness)
    for name, cls in found.strategies.items():
        if name == REFERENCE or not (issubclass(cls, OwnRunner) or cls().variants(replica_ranks(cfg.topology))):
            continue  # `auto` only chooses among the others
        if "decode" in cls.directions and cls.exactness.satisfies(required):
            settings = {"_target_": found.target(name), **asdict(cls())}  # type: ignore[call-overload]
            vae = replace(cfg.vae, parallel_decode=True, decode=settings)
            yield f"vae.parallel_decode=true vae/decode={name}", replace(cfg, vae=vae)
