"""A strategy's plan, computed from its assignment: the share of each rank, the exactness, the speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil

from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.vae.account import account_repeated
from cosmos3_pipeline.vae.assignment import Assignment, AssignmentError, Block, Layout, Tile, whole_picture
from cosmos3_pipeline.vae.clock import flops_until_end
from cosmos3_pipeline.vae.lowering import Lowered, lower_repeated
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.program import Program
from cosmos3_pipeline.vae.strategy import (
    DeclarationError,
    Exactness,
    RankShare,
    Strategy,
    StrategyError,
    StrategyPlan,
)

_ROUNDED = 1e-6  # sums of costs are rounded


def assigned(strategy: Strategy, program: Program, shape: LatentShape, ranks: int) -> Assignment:
    """The assignment of `strategy`. Raises StrategyError also if its code fails, so that others are planned."""
    try:
        assignment = strategy.assign(program, shape, ranks)
    except Refusal:
        raise
    except Exception as error:
        raise StrategyError(
            f"{strategy.name} failed: {type(error).__name__}: {error}",
            "its `assign` has a fault",
            "use another strategy, or mend the plugin",
        ) from error
    _is_for(ranks, strategy, assignment)
    return assignment


def plan_of(
    strategy: Strategy, program: Program, shape: LatentShape, assignment: Assignment, ranks: int
) -> StrategyPlan:
    """The plan of a clip of `shape` with the `assignment` of `strategy` for `ranks` ranks.

    Raises StrategyError if the blocks are no assignment, if a rank has no work, or if the result is less exact
    than the strategy promises.
    """
    with named(strategy):
        clip = lower_repeated(program, shape, assignment)
    lowered = clip.short
    check(strategy, lowered)
    shares = []
    for rank, tally in enumerate(account_repeated(clip)):
        ops = lowered.ops(rank)
        rows, cols = _extent(lowered, rank)
        shares.append(
            RankShare(
                rank=rank,
                ops=(ops[0], ops[-1] + 1),
                rows=rows,
                cols=cols,
                flops=tally.flops,
                weight_bytes=tally.weight_bytes,
                activation_bytes=tally.peak_bytes,
                sent_bytes=tally.sent_bytes,
                sent_messages=tally.sent_messages,
                runs=_runs(lowered, rank),
                folded_bytes=tally.folded_bytes,
            )
        )
    until_end = flops_until_end(clip)
    note = _note(assignment.note, assignment.speed_up or program.flops(shape) / until_end, assignment.ranks)
    exactness = exactness_of(lowered)
    return StrategyPlan(
        strategy.name, program.direction, exactness, tuple(shares), note, assignment, until_end, clip
    )


def _is_for(ranks: int, strategy: Strategy, assignment: Assignment) -> None:
    """Raise StrategyError if a plugin has returned something else than an assignment for `ranks` ranks."""
    is_one = isinstance(assignment, Assignment)
    if not is_one or assignment.ranks != ranks:
        given = f"an assignment for {assignment.ranks} ranks" if is_one else repr(assignment)
        raise StrategyError(
            f"{strategy.name} returned {given}",
            f"it was asked for an assignment for {ranks} ranks",
            f"mend its `assign`: return Assignment.of({ranks}, blocks)",
        )
    if assignment.speed_up and assignment.speed_up > ranks * (1 + _ROUNDED):
        raise StrategyError(
            f"{strategy.name} says that {ranks} ranks are {assignment.speed_up:.4g} times as fast as one",
            "they do the same work",
            "mend its `assign`: leave speed_up out, or give the one that its costs allow",
        )
    if wrong := [block for block in assignment.blocks if not isinstance(block, Block)]:
        raise StrategyError(
            f"{strategy.name} returned {wrong[0]!r} among its blocks",
            "an assignment is made of Blocks",
            "mend its `assign`: give Block((op, op), (chunk, chunk), rank)",
        )


@contextmanager
def named(strategy: Strategy) -> Iterator[None]:
    """Turn an AssignmentError into a StrategyError that names the strategy."""
    try:
        yield
    except AssignmentError as error:
        problem = error.problem
        raise StrategyError(f"{strategy.name}: {problem.what}", problem.why, problem.works) from None


def check(strategy: Strategy, lowered: Lowered) -> None:
    """Raise DeclarationError if the result is less exact than declared, StrategyError if a rank is idle."""
    exactness, needed = exactness_of(lowered), reach(lowered.program)
    if not exactness.satisfies(strategy.exactness):
        raise DeclarationError(
            f"{strategy.name} declares {strategy.exactness} and its blocks are {exactness}",
            "parts of a picture are computed to rounding, and a rank that warms up on fewer chunks than the ops "
            f"remember ({needed} here) sees other frames of the past",
            f"declare {exactness}, or warm up on {needed} chunks",
        )
    idle = [rank for rank in range(lowered.ranks) if not lowered.ops(rank)]
    if idle:
        raise StrategyError(
            f"{strategy.name} over {lowered.ranks} ranks leaves {len(idle)} without work, such as rank {idle[0]}",
            "it would only wait for the others",
            "use fewer ranks, or a larger clip",
        )


def _note(note: str, speed_up: float, ranks: int) -> str:
    fast = "" if ranks == 1 else f"at best {speed_up:.2f} times one rank"
    return ": ".join(part for part in (note, fast) if part) or "one rank does all"


def exactness_of(lowered: Lowered) -> Exactness:
    """The exactness of the result that the assignment allows."""
    found = Exactness.BITWISE
    whole = whole_picture(lowered.shape)
    spans = {span for layout in set(lowered.layouts) for span in layout}
    if any(tile.rect != whole.scaled(tile.unit, 1) for span in spans for tile in (*span.tiles, *span.warming)):
        found = Exactness.ROUNDING
    needed = reach(lowered.program)
    for block in lowered.assignment.blocks:
        if block.warm_up and block.chunks[0] > 0 and block.warm_up < needed:
            found = Exactness.APPROXIMATE
    return found


def reach(program: Program) -> int:
    """On how many previous chunks a chunk's result depends: the sum over all ops of the chunks in their caches."""
    return ceil(sum(op.cached_frames / op.source.frames for op in program.ops))


def _extent(lowered: Lowered, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The latent rows and columns [start, stop) of a rank. A latent row with a cut inside counts on both sides."""
    tiles = {tile for layout in set(lowered.layouts) for span in layout for tile in span.tiles if tile.on(rank)}
    tops = (min(t.rect.top // t.unit for t in tiles), max(-(-t.rect.bottom // t.unit) for t in tiles))
    sides = (min(t.rect.left // t.unit for t in tiles), max(-(-t.rect.right // t.unit) for t in tiles))
    return tops, sides


def _runs(lowered: Lowered, rank: int) -> tuple[tuple[int, int], ...]:
    """The ops [start, stop) of a rank on each chunk; empty if they are the same on all chunks."""
    if not lowered.moves:
        return ()
    by_layout = {id(layout): _run(layout, rank) for layout in lowered.layouts}
    runs = tuple(by_layout[id(layout)] for layout in lowered.layouts)
    return runs if len(set(runs)) > 1 else ()


def _run(layout: Layout, rank: int) -> tuple[int, int]:
    spans = [span for span in layout if _has(span.tiles, rank)]
    return (spans[0].start, spans[-1].stop) if spans else (0, 0)


def _has(tiles: Sequence[Tile], rank: int) -> bool:
    return any(tile.on(rank) for tile in tiles)
