"""What would fit where a composition does not: the same clip with its weights or its VAE elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import product

from cosmos3_pipeline.config.schema import Config, Placement
from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.planning.geometry import replica_ranks
from cosmos3_pipeline.planning.plan import make_plan
from cosmos3_pipeline.vae.plugins import discover
from cosmos3_pipeline.vae.strategy import Exactness


def that_fits(cfg: Config, limit: float) -> str | None:
    """The overrides that make `cfg` need at most `limit` bytes on a rank, as few as possible; None without any.

    Where no placement and no strategy does, a clip that is shorter or smaller.
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
    for smaller in _smaller(cfg):
        words = " ".join(f"task.{key}={value}" for key, value in smaller.items())
        with suppress(Refusal):
            task = replace(cfg.task, **smaller)  # type: ignore[arg-type]
            if make_plan(replace(cfg, task=task)).peak_bytes <= limit:
                return words
    return None


def _smaller(cfg: Config) -> Iterator[dict[str, int]]:
    """Shorter clips, then those of the model's smaller sizes, longest and largest first."""
    frames, step = cfg.task.num_frames, cfg.model.vae.scale_factor_temporal
    chunks = (frames - 1) // step
    while (chunks := chunks // 2) > max(cfg.task.condition_latent_frames, default=0):
        yield {"num_frames": step * chunks + 1}
    wide, area = cfg.task.width >= cfg.task.height, cfg.task.width * cfg.task.height
    sizes = {tuple(map(int, size.split("x"))) for tier in cfg.model.trained.tiers for size in tier.sizes}
    for width, height in sorted(sizes, key=lambda size: -size[0] * size[1]):
        if width * height < area and (width >= height) == wide:
            yield {"width": width, "height": height}


def _placements(cfg: Config) -> Iterator[tuple[str, Config]]:
    """The override, "" for what is chosen already, and the config with it."""
    yield "", cfg
    for placement in (Placement.sharded, Placement.streamed):
        if placement is Placement.sharded and replica_ranks(cfg.topology) == 1:
            continue
        weights = replace(cfg.weights, placement=placement, resident_layers=0)
        yield f"weights={placement.value}", replace(cfg, weights=weights)


def _decodes(cfg: Config) -> Iterator[tuple[str, Config]]:
    """As `_placements`, for the strategies that are exact enough for `cfg`."""
    yield "", cfg
    found = discover()
    required = Exactness(cfg.vae.required_exactness)
    for name, cls in found.strategies.items():
        if "decode" in cls.directions and cls.exactness.satisfies(required):
            settings = {"_target_": found.target(name), **asdict(cls())}  # type: ignore[call-overload]
            vae = replace(cfg.vae, parallel_decode=True, decode=settings)
            yield f"vae.parallel_decode=true vae/decode={name}", replace(cfg, vae=vae)
