"""Ranking the layouts of a topology for a task: guidance x sequence x weights x VAE, by estimated time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product

from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.config.schema import Config, Placement
from cosmos3_pipeline.denoise.shards import Grid
from cosmos3_pipeline.errors import ConfigError
from cosmos3_pipeline.planning.checks import check
from cosmos3_pipeline.planning.geometry import replica_ranks
from cosmos3_pipeline.planning.plan import Plan
from cosmos3_pipeline.planning.sampling import guidance_of
from cosmos3_pipeline.vae.plugins import REFERENCE, discover
from cosmos3_pipeline.vae.program import program_for
from cosmos3_pipeline.vae.search import variants
from cosmos3_pipeline.vae.strategy import OwnRunner, Strategy


@dataclass(frozen=True)
class Candidate:
    """One layout: the overrides that choose it and its plan, or the reason why it is refused."""

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
    """Every layout of the ranks of `cfg`: those that fit, then those that do not fit, then those refused.

    Faster layouts come first, then those with less memory, then those that send less. A layout that does not fit
    with resident weights is also tried with each other placement.
    """
    found = []
    for choice in _choices(cfg):
        found.append(_candidate(cfg, *choice, Placement.resident))
        if not found[-1].refused and not found[-1].usable:
            placements = [*[Placement.sharded] * (replica_ranks(cfg.topology) > 1), Placement.streamed]
            found += [_candidate(cfg, *choice, placement) for placement in placements]
    return sorted(found, key=_order)


def _order(candidate: Candidate) -> tuple[bool, bool, float, int, int, tuple[str, ...]]:
    plan = candidate.plan
    if plan is None:
        return True, True, 0.0, 0, 0, candidate.overrides
    sent = sum(plan.sent(stage).bytes for stage in plan.ranks[0].stages)
    return False, not plan.fits, candidate.seconds, plan.peak_bytes, sent, candidate.overrides


def _choices(cfg: Config) -> Iterator[tuple[int, Grid, Strategy | None]]:
    """Every way to use the ranks of a clip: (ranks on `cfg`, grid of the sequence, decode strategy or None).

    If `cfg` x `ulysses` is less than all ranks, the other ranks are left without denoising work, or they form the
    `cp` grid that sends the fewest bytes.
    """
    ranks = replica_ranks(cfg.topology)
    guidance = range(1, len(guidance_of(cfg.task, cfg.sampler).passes) + 1)
    layouts = list[tuple[int, Grid]]()
    for g, u in product(guidance, range(1, ranks + 1)):
        groups, rest = divmod(ranks, g * u)
        if not rest:
            layouts += [(g, Grid(u)), *[(g, _grid(cfg, u, groups))] * (groups > 1)]
    program = program_for("decode", plain(cfg.model.vae))
    # None runs the reference, so the reference is not tried again as a strategy.
    classes = [cls for name, cls in discover().strategies.items() if name != REFERENCE]
    strategies: list[Strategy | None] = [None]
    if ranks > 1:
        strategies += [cls() for cls in classes if issubclass(cls, OwnRunner) and "decode" in cls.directions]
        strategies += variants(classes, program, ranks)
    for (g, grid), strategy in product(layouts, strategies):
        yield g, grid, strategy


def _grid(cfg: Config, ulysses: int, groups: int) -> Grid:
    """The grid of `groups` that sends least: queries and results in rows, keys and values in columns."""
    model = cfg.model.transformer

    def heads(grid: Grid) -> int:
        return 2 * model.num_attention_heads * grid.columns + 2 * model.num_key_value_heads * grid.rows

    return min((Grid(ulysses, groups // n, n) for n in range(1, groups + 1) if groups % n == 0), key=heads)


def _candidate(
    cfg: Config, guidance: int, grid: Grid, strategy: Strategy | None, placement: Placement
) -> Candidate:
    overrides = [f"weights={placement.value}"]
    stay = None if placement is Placement.streamed else 0
    if stay is None:
        overrides.append("weights.resident_layers=null")
    overrides += [f"topology.cfg={guidance}", f"topology.ulysses={grid.ulysses}"]
    cp = [grid.rows, grid.columns]
    if cp != cfg.topology.cp:
        overrides.append(f"topology.cp=[{grid.rows},{grid.columns}]")
    decode = cfg.vae.decode
    if strategy is None:
        overrides.append("vae.parallel_decode=false")
    else:
        settings, default = asdict(strategy), type(strategy)()  # type: ignore[call-overload]
        overrides += ["vae.parallel_decode=true", f"vae/decode={strategy.name}"]
        changed = {key: value for key, value in settings.items() if value != getattr(default, key)}
        overrides += [f"vae.decode.{key}={value}" for key, value in changed.items()]
        decode = {"_target_": discover().target(strategy.name), **settings}
    tried = replace(
        cfg,
        topology=replace(cfg.topology, cfg=guidance, cp=cp, ulysses=grid.ulysses),
        weights=replace(cfg.weights, placement=placement, resident_layers=stay),
        vae=replace(cfg.vae, parallel_decode=strategy is not None, decode=decode),
    )
    try:
        return Candidate(tuple(overrides), check(tried).plan())
    except ConfigError as error:
        return Candidate(tuple(overrides), None, error.problems[0].what)
