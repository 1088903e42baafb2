"""What one rank of a shard group does for one chunk: computing, rounds of messages, and where it waits for them.

The order is the executor's (`vae/bound_ops.py`): a norm computes the rows that neighbours wait for first, and they
travel while it computes the rest; what reads a halo waits for it; attention gathers whole frames, on every rank.

Not followed: on CPU a norm of a small slab is one call, and its halo travels only after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from cosmos3_pipeline.plan.op_costs import OpCosts
from cosmos3_pipeline.vae.ops import Attention, LatentShape, Margins, NormSilu, Op
from cosmos3_pipeline.vae.program import Program
from cosmos3_pipeline.vae.strategy import RankShare

Span = tuple[int, int]
Parcel = tuple[int, int]  # the rank that it goes to or comes from, and its bytes


@dataclass(frozen=True)
class Round:
    """Messages that a rank starts together."""

    sends: tuple[Parcel, ...]
    receives: tuple[Parcel, ...]


class Arrive(Enum):
    """Wait for the last round."""

    ALL = 0


Step = float | Round | Arrive  # a float is seconds of computing


def overlap(a: Span, b: Span) -> int:
    """How many rows (or columns) two spans have in common."""
    return max(0, min(a[1], b[1]) - max(a[0], b[0]))


def common_area(a: RankShare, b: RankShare) -> int:
    """Latent pixels that two shares have in common."""
    return overlap(a.rows, b.rows) * overlap(a.cols, b.cols)


class Chunk:
    """One chunk on one rank of a shard group, all of which own the same ops."""

    def __init__(
        self,
        program: Program,
        shape: LatentShape,
        costs: OpCosts,
        group: Sequence[RankShare],
        own: RankShare,
        *,
        first: bool,
    ) -> None:
        self._program = program
        self._ops = program.ops
        self._parts = 1
        self._shape = shape
        self._costs = costs
        self._own = own
        self._others = [share for share in group if share.rank != own.rank]
        self._first = first
        self._rows = _area(own, 1) / shape.cols

    def portions(self) -> list[list[Step]]:
        """What the rank does for each portion that leaves it, in order. The ops that see the chunk whole are done
        with the first. Computing that follows computing is put together.
        """
        start, stop = self._own.ops
        leaving = self._program.portions_at(stop, first=self._first)
        whole = stop if leaving == 1 else max(start, self._program.portions_from)
        return [
            _joined(self._steps(start, whole, 1) * (number == 0) + self._steps(whole, stop, leaving))
            for number in range(leaving)
        ]

    def _steps(self, start: int, stop: int, parts: int) -> list[Step]:
        """Ops [start, stop) on one of `parts` portions."""
        self._parts = parts
        steps: list[Step] = []
        under_way = False
        for index in range(start, stop):
            op = self._ops[index]
            if isinstance(op, Attention) and self._others:
                whole = self._costs.seconds(index, self._shape.rows, self._first) / parts
                steps += [self._gather(op), Arrive.ALL, whole]
                continue
            halo = self._halo(op)
            if halo is not None:
                steps += [] if under_way else [halo]
                steps += [Arrive.ALL, self._seconds(index)]
                under_way = False
                continue
            following = self._halo(self._ops[index + 1]) if index + 1 < stop else None
            if isinstance(op, NormSilu) and following is not None:
                # Calls of their own, so that what is fixed in an op's cost is paid by each part.
                edges = self._edges(self._ops[index + 1])
                rest = 1 - sum(edges)
                steps += [sum(self._seconds(index, part) for part in edges), following]
                steps.append(self._seconds(index, rest) if rest else 0.0)
                under_way = True
            else:
                steps.append(self._seconds(index))
        return steps

    def _seconds(self, index: int, share: float = 1.0) -> float:
        """Of a portion, on `share` of this slab."""
        return self._costs.seconds(index, share * self._rows, self._first) / self._parts

    def _gather(self, op: Op) -> Round:
        """This rank's slab to every other, and theirs."""
        given = self._nbytes(op, _area(self._own, op.source.scale))
        return Round(
            tuple((other.rank, given) for other in self._others),
            tuple((other.rank, self._nbytes(op, _area(other, op.source.scale))) for other in self._others),
        )

    def _halo(self, op: Op) -> Round | None:
        """What neighbours read of this slab to run `op`, and this slab of theirs; None when nothing."""
        if not op.margins or not self._others:
            return None
        scale = op.source.scale
        sends, receives = [], []
        for other in self._others:
            given = _read(other, self._own, op.margins, scale)
            taken = _read(self._own, other, op.margins, scale)
            sends += [(other.rank, self._nbytes(op, given))] * (given > 0)
            receives += [(other.rank, self._nbytes(op, taken))] * (taken > 0)
        return Round(tuple(sends), tuple(receives)) if sends or receives else None

    def _nbytes(self, op: Op, area: int) -> int:
        frames = 1 if self._first else op.source.frames // self._parts
        return self._shape.batch * frames * area * op.source.channels * self._shape.element_bytes

    def _edges(self, op: Op) -> list[float]:
        """The shares of this slab that neighbours wait for, for `op`: strips along its sides, corners once."""
        own, m, scale = self._own, op.margins, op.source.scale
        height, width = (own.rows[1] - own.rows[0]) * scale, (own.cols[1] - own.cols[0]) * scale
        beside = [other for other in self._others if overlap(other.cols, own.cols)]
        abreast = [other for other in self._others if overlap(other.rows, own.rows)]
        # The neighbour above reads as many of the first rows as it has margin below itself, and so on around.
        top = min(height, m.bottom * any(other.rows[1] == own.rows[0] for other in beside))
        bottom = min(height - top, m.top * any(other.rows[0] == own.rows[1] for other in beside))
        left = min(width, m.right * any(other.cols[1] == own.cols[0] for other in abreast))
        right = min(width - left, m.left * any(other.cols[0] == own.cols[1] for other in abreast))
        between = height - top - bottom
        areas = [top * width, bottom * width, between * left, between * right]
        return [area / (height * width) for area in areas if area]


def _joined(steps: Sequence[Step]) -> list[Step]:
    joined: list[Step] = []
    for step in steps:
        if isinstance(step, float) and joined and isinstance(joined[-1], float):
            joined[-1] += step
        else:
            joined.append(step)
    return joined


def _area(share: RankShare, scale: int) -> int:
    return (share.rows[1] - share.rows[0]) * (share.cols[1] - share.cols[0]) * scale**2


def _read(reader: RankShare, owner: RankShare, margins: Margins, scale: int) -> int:
    """Pixels at `scale` that an op with `margins` on `reader` reads of `owner`."""
    rows = overlap(_widened(reader.rows, scale, margins.top, margins.bottom), _scaled(owner.rows, scale))
    cols = overlap(_widened(reader.cols, scale, margins.left, margins.right), _scaled(owner.cols, scale))
    return rows * cols


def _scaled(span: Span, scale: int) -> Span:
    return span[0] * scale, span[1] * scale


def _widened(span: Span, scale: int, before: int, after: int) -> Span:
    return span[0] * scale - before, span[1] * scale + after
