"""Ranking the layouts of a topology for a task: guidance x sequence x weights x VAE, by estimated time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.config.schema import Config, Placement
from cosmos3_pipeline.denoise.shards import Grid
from cosmos3_pipeline.errors import ConfigError
from cosmos3_pipeline.planning.checks import check
from cosmos3_pipeline.planning.geometry import replica_ranks
from cosmos3_pipeline.planning.hardware import vae_rates
from cosmos3_pipeline.planning.plan import Plan
from cosmos3_pipeline.planning.sampling import guidance_of
from cosmos3_pipeline.planning.vae import directions, shape_of
from cosmos3_pipeline.vae.plugins import REFERENCE, discover
from cosmos3_pipeline.vae.program import Direction, program_for
from cosmos3_pipeline.vae.search import search as search_vae
from cosmos3_pipeline.vae.search import variants
from cosmos3_pipeline.vae.strategy import Exactness, OwnRunner, Strategy


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


@dataclass(frozen=True)
class _Choice:
    """A layout: ranks on `topology.cfg`, the grid of the sequence, the weights, a strategy for each direction."""

    guidance: int
    grid: Grid
    placement: Placement
    vae: Mapping[Direction, Strategy | None]


def search(cfg: Config) -> list[Candidate]:
    """Layouts of the ranks of `cfg`: those that fit, then those that do not fit, then those refused.

    Faster layouts come first, then those with less memory, then those that send less. Denoising and the VAE do not
    overlap, so their times add. Every division of denoising is therefore tried with the fastest strategy of the
    VAE, and then the best division with every strategy. A layout that does not fit with resident weights is also
    tried with each other placement.
    """
    ways = {direction: _ways(cfg, direction) for direction in directions(cfg)}
    first = {direction: strategies[0] for direction, strategies in ways.items()}
    found = list[tuple[_Choice, Candidate]]()
    for guidance, grid in _layouts(cfg):
        choices = [_Choice(guidance, grid, Placement.resident, first)]
        found.append((choices[0], _candidate(cfg, choices[0])))
        if not found[-1][1].refused and not found[-1][1].usable:
            placements = [*[Placement.sharded] * (replica_ranks(cfg.topology) > 1), Placement.streamed]
            choices = [replace(choices[0], placement=placement) for placement in placements]
            found += [(choice, _candidate(cfg, choice)) for choice in choices]
    best, _ = min(found, key=lambda one: _order(one[1]))
    for direction, (_, *others) in ways.items():
        choices = [replace(best, vae={**first, direction: other}) for other in others]
        found += [(choice, _candidate(cfg, choice)) for choice in choices]
    return sorted((candidate for _, candidate in found), key=_order)


def _order(candidate: Candidate) -> tuple[bool, bool, float, int, int, tuple[str, ...]]:
    plan = candidate.plan
    if plan is None:
        return True, True, 0.0, 0, 0, candidate.overrides
    sent = sum(plan.sent(stage).bytes for stage in plan.ranks[0].stages)
    return False, not plan.fits, candidate.seconds, plan.peak_bytes, sent, candidate.overrides


def _layouts(cfg: Config) -> Iterator[tuple[int, Grid]]:
    """Every way to denoise with the ranks of a clip: (ranks on `cfg`, grid of the sequence).

    If `cfg` x `ulysses` is less than all ranks, the other ranks are left without denoising work, or they form the
    `cp` grid that sends the fewest bytes.
    """
    ranks = replica_ranks(cfg.topology)
    guidance = range(1, len(guidance_of(cfg.task, cfg.sampler).passes) + 1)
    for g, u in product(guidance, range(1, ranks + 1)):
        groups, rest = divmod(ranks, g * u)
        if not rest:
            yield g, Grid(u)
            if groups > 1:
                yield g, _grid(cfg, u, groups)


def _ways(cfg: Config, direction: Direction) -> list[Strategy | None]:
    """The strategies for a direction, the fastest first, in the order of `vae.search`; None: its flag is off.

    Those that this search leaves out come last: they refuse the clip, are not exact enough, or have their own
    runner.
    """
    ranks, strategies = replica_ranks(cfg.topology), discover().strategies
    if ranks == 1:
        return [None]
    program, shape, rates = program_for(direction, plain(cfg.model.vae)), shape_of(cfg, direction), vae_rates(cfg)
    found = search_vae(
        strategies.values(),
        program,
        shape,
        ranks,
        costs=rates.costs(program, shape),
        links=rates.link,
        required=Exactness(cfg.vae.required_exactness),
    )
    ways = [one.strategy for one in found]
    ways += [one for one in variants(strategies.values(), program, ranks) if one not in ways]
    ways += [cls() for cls in strategies.values() if issubclass(cls, OwnRunner) and direction in cls.directions]
    return [None if one.name == REFERENCE else one for one in ways]


def _grid(cfg: Config, ulysses: int, groups: int) -> Grid:
    """The grid of `groups` that sends least: queries and results in rows, keys and values in columns."""
    model = cfg.model.transformer

    def heads(grid: Grid) -> int:
        return 2 * model.num_attention_heads * grid.columns + 2 * model.num_key_value_heads * grid.rows

    return min((Grid(ulysses, groups // n, n) for n in range(1, groups + 1) if groups % n == 0), key=heads)


def _candidate(cfg: Config, choice: _Choice) -> Candidate:
    grid, placement = choice.grid, choice.placement
    overrides = [f"weights={placement.value}"]
    stay = None if placement is Placement.streamed else 0
    if stay is None:
        overrides.append("weights.resident_layers=null")
    overrides += [f"topology.cfg={choice.guidance}", f"topology.ulysses={grid.ulysses}"]
    cp = [grid.rows, grid.columns]
    if cp != cfg.topology.cp:
        overrides.append(f"topology.cp=[{grid.rows},{grid.columns}]")
    vae = cfg.vae
    for direction, strategy in choice.vae.items():
        changes: dict[str, Any] = {f"parallel_{direction}": strategy is not None}
        overrides.append(f"vae.parallel_{direction}={str(strategy is not None).lower()}")
        if strategy is not None:
            settings, default = asdict(strategy), type(strategy)()  # type: ignore[call-overload]
            changed = {key: value for key, value in settings.items() if value != getattr(default, key)}
            overrides += [f"vae/{direction}={strategy.name}"]
            overrides += [f"vae.{direction}.{key}={value}" for key, value in changed.items()]
            changes[direction] = {"_target_": discover().target(strategy.name), **settings}
        vae = replace(vae, **changes)
    tried = replace(
        cfg,
        topology=replace(cfg.topology, cfg=choice.guidance, cp=cp, ulysses=grid.ulysses),
        weights=replace(cfg.weights, placement=placement, resident_layers=stay),
        vae=vae,
    )
    try:
        return Candidate(tuple(overrides), check(tried).plan())
    except ConfigError as error:
        return Candidate(tuple(overrides), None, error.problems[0].what)
