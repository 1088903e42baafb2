"""The fastest assignment of a clip among all strategies that are exact enough, by the clock. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.vae.assignment import Assignment
from cosmos3_pipeline.vae.clock import FlopCosts, Links, OpCosts, timeline
from cosmos3_pipeline.vae.lowering import lower_repeated
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.planning import assigned, check, exactness_of
from cosmos3_pipeline.vae.program import Program
from cosmos3_pipeline.vae.strategy import Exactness, OwnRunner, Strategy


@dataclass(frozen=True)
class Found:
    """One assignment that was tried: its strategy, its exactness, and its predicted seconds."""

    strategy: Strategy
    assignment: Assignment
    exactness: Exactness
    seconds: float


def variants(strategies: Iterable[type[Strategy]], program: Program, ranks: int) -> Iterator[Strategy]:
    """Each strategy that supports the program's direction, with each of its settings that are worth trying.

    A strategy with its own runner is left out, because it computes another picture; users must choose it by name.
    """
    for cls in strategies:
        if program.direction in cls.directions and not issubclass(cls, OwnRunner):
            try:
                yield from cls().variants(ranks)
            except Exception:  # a plugin must not end the search; its own plan says what is wrong with it
                yield cls()


def search(
    strategies: Iterable[type[Strategy]],
    program: Program,
    shape: LatentShape,
    ranks: int,
    *,
    costs: OpCosts | None,
    links: Links | None,
    required: Exactness,
) -> list[Found]:
    """The assignments of `strategies` for a clip of `shape`, fastest first; at equal speed, the more exact first.

    Strategies that refuse the clip are left out, and so are results less exact than `required`, and every
    approximate result, because users must choose these by name. Without `costs` the time of an op is its FLOPs.
    """
    required = min(required, Exactness.ROUNDING, key=list(Exactness).index)
    found: list[tuple[tuple[float, int, int], Found]] = []
    for number, strategy in enumerate(variants(strategies, program, ranks)):
        try:
            assignment = assigned(strategy, program, shape, ranks)
            clip = lower_repeated(program, shape, assignment)
            check(strategy, clip.short)
        except Refusal:
            continue  # it cannot do this clip on this number of ranks, or promises what its blocks do not have
        exactness = exactness_of(clip.short)
        if not exactness.satisfies(required):
            continue
        seconds = clip.total(lambda lowered: timeline(lowered, costs or FlopCosts(lowered), links).seconds)
        order = (seconds, list(Exactness).index(exactness), number)
        found.append((order, Found(strategy, assignment, exactness, seconds)))
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]
