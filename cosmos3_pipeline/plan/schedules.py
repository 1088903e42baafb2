"""From the shares of a plan to what each rank does, one event after the other.

`Line` follows `Place` of layer_pipeline and `Collector` of spatial_shard: the next portion is received early, and
as many results of a line may be leaving (`portions_under_way`). `Pieces` follows the runner of tiled.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

from cosmos3_pipeline.plan.events import Clock, Message, Process
from cosmos3_pipeline.plan.op_costs import OpCosts
from cosmos3_pipeline.plan.rounds import Chunk, Parcel, Round, Step, part_of
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.program import Program, portions_under_way
from cosmos3_pipeline.vae.strategy import Exactness, RankShare, StrategyPlan


class SimulationError(ValueError):
    """A plan whose shares do not tell what its ranks wait for."""


def groups_of(program: Program, shape: LatentShape, plan: StrategyPlan) -> list[list[RankShare]]:
    """The shard groups of a plan in the order of their runs of ops.

    Raises SimulationError unless the runs follow each other up to the root's, and the slabs of each make up the
    picture once.
    """
    runs = sorted({tuple(map(share.on, range(program.chunks(shape)))) for share in plan.shares})
    groups = [[share for share in plan.shares if share.on(0) == run[0]] for run in runs]
    for on in zip(*runs, strict=True):
        if [0, *(stop for _, stop in on)] != [*(start for start, _ in on), len(program)]:
            raise _unknown(plan, f"have the runs of ops {', '.join(map(_text, on))} of {len(program)}")
    if plan.shares[0].on(0) != runs[-1][0]:
        raise _unknown(plan, f"give rank 0 the ops {_text(plan.shares[0].ops)}, which are not the last")
    for group in groups:
        for index, share in enumerate(group):
            for other in group[:index]:
                if part_of(share, -1, 1).common(part_of(other, -1, 1)):
                    who = f"ranks {other.rank} and {share.rank}"
                    raise _unknown(plan, f"give {who} the same rows and columns of ops {_text(share.ops)}")
        if sum(part_of(share, -1, 1).area for share in group) != shape.rows * shape.cols:
            raise _unknown(plan, f"leave rows or columns of ops {_text(group[0].ops)} to nobody")
    return groups


def in_pieces(program: Program, shape: LatentShape, plan: StrategyPlan) -> bool:
    """Whether the ranks do not see each other's part: each does everything, or the picture is approximate for it.

    Raises SimulationError for an approximate plan that does not send its results chunk by chunk.
    """
    if any(share.ops != (0, len(program)) for share in plan.shares):
        return False
    flops = program.flops(shape)
    if all(share.flops == flops and not share.sent_messages for share in plan.shares):
        return True
    if plan.exactness is not Exactness.APPROXIMATE:
        return False
    chunks = program.chunks(shape)
    for share in plan.shares[1:]:
        if share.sent_messages % chunks:
            raise _unknown(plan, f"let rank {share.rank} send {share.sent_messages} messages in {chunks} chunks")
    return True


def _unknown(plan: StrategyPlan, what: str) -> SimulationError:
    return SimulationError(
        f"the shares of {plan.strategy} {what}; from such shares nobody can tell which rank waits for which; "
        "measure it with job=bench, or simulate runs of ops that follow each other up to the root's, the slabs of "
        "each making up the picture"
    )


def _text(run: tuple[int, int]) -> str:
    return f"{run[0]}-{run[1] - 1}"


class Schedule:
    """Messages of one rank at a time. `done` collects when the root has each part of the picture."""

    def __init__(self, program: Program, shape: LatentShape, clock: Clock) -> None:
        self.done: list[float] = []
        self._program = program
        self._shape = shape
        self._clock = clock
        self._chunks = program.chunks(shape)

    def _start(
        self, rank: int, sends: Sequence[Parcel], receives: Sequence[Parcel], under_way: list[Message]
    ) -> Process:
        """Post messages, and pay for them what they take from computing."""
        busy = 0.0
        for source, nbytes in receives:
            under_way.append(self._clock.receive(source, rank))
            busy += self._clock.link(source, rank).busy(nbytes)
        for target, nbytes in sends:
            under_way.append(self._clock.send(rank, target, nbytes))
            busy += self._clock.link(rank, target).busy(nbytes)
        if busy:
            yield busy

    def _picture_bytes(self, share: RankShare, *, first: bool) -> int:
        """Of one portion of the 8-bit picture of `share`."""
        program = self._program
        frames = 1 if first else program.temporal // program.portions_at(len(program), first=False)
        pixels = part_of(share, len(program), program.spatial).area
        return self._shape.batch * frames * pixels * program.picture_channels


class Line(Schedule):
    """Shard groups, through which the chunks pass. The root is in the last and collects its slabs."""

    def __init__(
        self,
        program: Program,
        shape: LatentShape,
        plan: StrategyPlan,
        costs: OpCosts,
        clock: Clock,
        *,
        overlaps: bool,
    ) -> None:
        super().__init__(program, shape, clock)
        self._costs = costs
        self._overlaps = overlaps
        self._groups = groups_of(program, shape, plan)

    def process(self, rank: int) -> Process:
        """What `rank` does."""
        place = next(i for i, group in enumerate(self._groups) if any(share.rank == rank for share in group))
        group = self._groups[place]
        own = next(share for share in group if share.rank == rank)
        portions: dict[tuple[bool, tuple[int, int]], list[list[Step]]] = {}
        above = self._groups[place - 1] if place else ()
        below = self._groups[place + 1] if place + 1 < len(self._groups) else ()
        expected = deque(parcels for index in range(self._chunks) for parcels in self._coming(own, above, index))
        arriving: list[Message] = []
        leaving: deque[list[Message]] = deque()
        most = portions_under_way(self._chunks, moving=bool(own.runs)) if below else 1
        collected: deque[list[Message]] = deque()
        if self._overlaps:
            yield from self._start(rank, (), expected.popleft(), arriving)
        for index in range(self._chunks):
            first = index == 0
            ops = own.on(index)
            given = self._program.portions_at(ops[0], first=first)
            if (first, ops) not in portions:
                now = replace(own, ops=ops)
                chunk = Chunk(self._program, self._shape, self._costs, group, now, first=first)
                portions[first, ops] = chunk.portions()
            for number, steps in enumerate(portions[first, ops]):
                if number < given:
                    if not self._overlaps:
                        yield from self._start(rank, (), expected.popleft(), arriving)
                    yield from _all(arriving)
                    if self._overlaps and expected:
                        yield from self._start(rank, (), expected.popleft(), arriving)
                yield from self._run(rank, steps)
                if not below and rank == 0:
                    parts = [
                        (share.rank, self._picture_bytes(share, first=first)) for share in group if share.rank
                    ]
                    # The others' slabs are under way while the next portion is computed.
                    collected.append([])
                    yield from self._start(rank, (), parts, collected[-1])
                    if len(collected) > bool(parts and self._overlaps):
                        yield from _all(collected.popleft())
                        self.done.append(self._clock.now)
                    continue
                # Some results may be under way while the next is computed.
                if len(leaving) == most:
                    yield from _all(leaving.popleft())
                leaving.append([])
                parcels = [(0, self._picture_bytes(own, first=first))]
                if below:
                    parcels = self._crossing(ops[1], own, below, first=first)
                    parcels += self._kept(own, below, index) if number == 0 else []
                yield from self._start(rank, parcels, (), leaving[-1])
                if not self._overlaps:
                    yield from _all(leaving[-1])
        for last in collected:
            yield from _all(last)
            self.done.append(self._clock.now)
        for last in leaving:
            yield from _all(last)

    def _coming(self, own: RankShare, above: Sequence[RankShare], index: int) -> Iterator[list[Parcel]]:
        """What comes from above for a chunk, portion by portion."""
        first, (start, _) = index == 0, own.on(index)
        for number in range(self._program.portions_at(start, first=first)):
            parcels = self._crossing(start, own, above, first=first)
            if number == 0:
                parcels += [(other.rank, n) for other in above for _, n in self._kept(other, [own], index)]
            yield parcels

    def _kept(self, own: RankShare, below: Sequence[RankShare], index: int) -> list[Parcel]:
        """What `own` sends with the first portion of a chunk, on which the rank below runs ops that it has run."""
        if not index:
            return []
        ops = self._program.keeping(own.on(index)[1], own.on(index - 1)[1])
        shapes = [self._program.kept_shape(op, self._shape) for op in ops]
        size = self._shape.element_bytes
        return [(other.rank, size * math.prod(shape)) for other in below for shape in shapes]

    def _run(self, rank: int, steps: Sequence[Step]) -> Process:
        under_way: list[Message] = []
        for step in steps:
            if isinstance(step, float):
                yield step
                continue
            if isinstance(step, Round):
                yield from self._start(rank, step.sends, step.receives, under_way)
                if self._overlaps:
                    continue
            yield from _all(under_way)

    def _crossing(self, cut: int, own: RankShare, others: Sequence[RankShare], *, first: bool) -> list[Parcel]:
        """One portion of what crosses the cut before op `cut` between `own` and each of `others`.

        A tensor after the other.
        """
        shape = self._shape
        scale = self._program.carried(cut)[0].scale
        ours = part_of(own, cut - 1, scale)
        # A shortcut that is open may have fewer pixels than the activation, in the same proportions.
        per_pixel = [
            Fraction(math.prod(tensor) * shape.element_bytes, shape.rows * shape.cols * scale**2)
            for tensor in self._program.carried_shapes(cut, shape, first=first)
        ]
        parts = [(other.rank, ours.common(part_of(other, cut - 1, scale))) for other in others]
        return [(rank, int(area * size)) for rank, area in parts if area for size in per_pixel]


class Pieces(Schedule):
    """Ranks that do not see each other's part: a share of the arithmetic each, results to the root.

    A rank's tiles count as one piece of as many rows; putting them together on the root is not counted.
    """

    def __init__(
        self, program: Program, shape: LatentShape, plan: StrategyPlan, costs: OpCosts, clock: Clock
    ) -> None:
        super().__init__(program, shape, clock)
        self._plan = plan
        whole = program.flops(shape)
        rows = [share.flops / whole * shape.rows for share in plan.shares]
        self._seconds = [
            {first: sum(costs.seconds(i, part, first) for i in range(len(program))) for first in (True, False)}
            for part in rows
        ]

    def process(self, rank: int) -> Process:
        """What `rank` does."""
        leaving: list[Message] = []
        for index in range(self._chunks):
            first = index == 0
            if rank:
                yield self._seconds[rank][first]
                yield from _all(leaving)
                yield from self._start(rank, [(0, n) for _, n in self._parcels(rank, first=first)], (), leaving)
                continue
            arriving: list[Message] = []
            for other in range(1, len(self._plan.shares)):
                yield from self._start(0, (), self._parcels(other, first=first), arriving)
            yield self._seconds[rank][first]
            yield from _all(arriving)
            self.done.append(self._clock.now)
        yield from _all(leaving)

    def _parcels(self, rank: int, *, first: bool) -> list[Parcel]:
        """What `rank` sends to the root after a chunk: its messages alike, bytes by frames of the picture."""
        share = self._plan.shares[rank]
        messages = share.sent_messages // self._chunks
        frames = 1 if first else self._program.temporal
        nbytes = share.sent_bytes * frames // self._program.picture_frames(self._shape.frames)
        return [(rank, nbytes // messages)] * messages if messages else []


def _all(messages: list[Message]) -> Iterator[Message]:
    """Wait for each, and forget them."""
    yield from messages
    messages.clear()
