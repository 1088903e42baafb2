"""Ranking the layouts of a topology for a task: guidance x sequence x VAE strategy, by estimated time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import cast

from cosmos3_pipeline.config.plugins import discover
from cosmos3_pipeline.config.schema import Config
from cosmos3_pipeline.errors import ConfigError
from cosmos3_pipeline.plan.checks import check
from cosmos3_pipeline.plan.geometry import replica_ranks
from cosmos3_pipeline.plan.plan import Plan
from cosmos3_pipeline.plan.vae import REFERENCE
from cosmos3_pipeline.vae.strategy import Strategy


@dataclass(frozen=True)
class Candidate:
    """One layout: the overrides that choose it and its plan, or the reason why it cannot be."""

    overrides: tuple[str, ...]
    plan: Plan | None
    refused: str = ""

    @property
    def seconds(self) -> float:
        assert self.plan is not None
        return sum(self.plan.seconds.values())

    @property
    def usable(self) -> bool:
        return self.plan is not None and self.plan.fits


def search(cfg: Config) -> list[Candidate]:
    """Every layout of the ranks of `cfg`: those that fit, fastest first, then those that do not, then the refused.

    Equal times are told apart by memory, then by what is sent.
    """
    found = [_candidate(cfg, *choice) for choice in _choices(cfg)]
    return sorted(found, key=_order)


def _order(candidate: Candidate) -> tuple[bool, bool, float, int, int, tuple[str, ...]]:
    plan = candidate.plan
    if plan is None:
        return True, True, 0.0, 0, 0, candidate.overrides
    sent = sum(plan.sent(stage).bytes for stage in plan.ranks[0].stages)
    return False, not plan.fits, candidate.seconds, plan.peak_bytes, sent, candidate.overrides


def _choices(cfg: Config) -> Iterator[tuple[int, int, str]]:
    """(cfg, ulysses, decode strategy or "" for none) of every way to use all ranks of a clip."""
    ranks = replica_ranks(cfg.topology)
    guidance = (1, 2) if cfg.sampler.guidance_scale != 1.0 else (1,)
    layouts = [(g, u) for g in guidance for u in range(1, ranks + 1) if ranks % (g * u) == 0]
    usable = (n for n, cls in discover().strategies.items() if "decode" in cast(type[Strategy], cls).directions)
    # One that picks is the best of the others.
    real = (n for n in usable if n != REFERENCE and not cast(type[Strategy], discover().strategies[n]).picks)
    strategies = ["", *real]
    for (g, u), strategy in product(layouts, strategies if ranks > 1 else [""]):
        yield g, u, strategy


def _candidate(cfg: Config, guidance: int, ulysses: int, strategy: str) -> Candidate:
    overrides = [f"topology.cfg={guidance}", f"topology.ulysses={ulysses}"]
    overrides += (
        ["vae.parallel_decode=true", f"vae/decode={strategy}"] if strategy else ["vae.parallel_decode=false"]
    )
    decode = {"_target_": discover().target(strategy)} if strategy else cfg.vae.decode
    tried = replace(
        cfg,
        topology=replace(cfg.topology, cfg=guidance, ulysses=ulysses),
        vae=replace(cfg.vae, parallel_decode=bool(strategy), decode=decode),
    )
    try:
        return Candidate(tuple(overrides), check(tried).plan())
    except ConfigError as error:
        return Candidate(tuple(overrides), None, error.problems[0].what)
