"""What one rank of a shard group does for one chunk: computing, rounds of messages, and where it waits for them.

The order is the executor's (`vae/bound_ops.py`): a norm computes the rows that neighbours wait for first, and they
travel while it computes the rest; what reads a halo waits for it; attention gathers whole frames, for its keys and
values.

Not followed: a convolution makes what it can before it waits. On CPU a norm is one call unless the slab is large
(`bound_ops.NORM_BLOCKS_AT_ONCE`), and its halo travels only after it.
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


@dataclass(frozen=True)
class Part:
    """Rows and columns [start, stop) of the picture."""

    rows: Span
    cols: Span

    @property
    def area(self) -> int:
        return self.common(self)

    def common(self, other: Part) -> int:
        """Pixels that two parts have in common."""
        return overlap(self.rows, other.rows) * overlap(self.cols, other.cols)

    def widened(self, margins: Margins) -> Part:
        """With what an op reads beyond it."""
        (top, bottom), (left, right) = self.rows, self.cols
        return Part((top - margins.top, bottom + margins.bottom), (left - margins.left, right + margins.right))


def part_of(share: RankShare, number: int, scale: int) -> Part:
    """What of the picture `share` runs op `number` on, where `scale` rows make a latent one."""
    rows, cols, unit = share.rows, share.cols, 1
    for deal in share.deals:
        if deal.start <= number:
            rows, cols, unit = deal.rows, deal.cols, deal.unit
    return Part(
        (rows[0] * scale // unit, rows[1] * scale // unit), (cols[0] * scale // unit, cols[1] * scale // unit)
    )


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
        self._dealt = [deal.start for deal in own.deals]

    def portions(self) -> list[list[Step]]:
        """What the rank does for each portion that leaves it, in order. The ops that see the chunk whole are done
        with the first. Computing that follows computing is put together.
        """
        start, stop = self._own.ops
        given, leaving = (self._program.portions_at(cut, first=self._first) for cut in (start, stop))
        whole = stop if leaving == 1 else max(start, self._program.portions_from)
        found = []
        for number in range(leaving):
            steps: list[Step] = []
            if number < given:
                # What comes is dealt as it comes, and a chunk before it is seen in portions.
                steps += self._dealing(start, given) + self._steps(start, whole, 1)
                steps += self._dealing(whole, 1) if start < whole < stop else []
            found.append(_joined(steps + self._steps(whole, stop, leaving)))
        return found

    def _dealing(self, index: int, parts: int) -> list[Step]:
        """Of one of `parts` portions, before op `index`; nothing where slabs stay as they are."""
        self._parts = parts
        return [self._deal(index), Arrive.ALL] if index and index in self._dealt else []

    def _steps(self, start: int, stop: int, parts: int) -> list[Step]:
        """Ops [start, stop) on one of `parts` portions, which have been dealt for the first."""
        self._parts = parts
        steps: list[Step] = []
        under_way = False
        for index in range(start, stop):
            op = self._ops[index]
            if index > start:
                steps += self._dealing(index, parts)
            if isinstance(op, Attention) and self._others:
                steps += [self._gather(index), Arrive.ALL, self._attention(index, op)]
                continue
            halo = self._halo(index)
            if halo is not None:
                steps += [] if under_way else [halo]
                steps += [Arrive.ALL, self._seconds(index)]
                under_way = False
                continue
            following = self._halo(index + 1) if index + 1 < stop else None
            if isinstance(op, NormSilu) and following is not None:
                # Calls of their own, so that what is fixed in an op's cost is paid by each part.
                edges = self._edges(index + 1)
                rest = 1 - sum(edges)
                steps += [sum(self._seconds(index, part) for part in edges), following]
                steps.append(self._seconds(index, rest) if rest else 0.0)
                under_way = True
            else:
                steps.append(self._seconds(index))
        return steps

    def _seconds(self, index: int, share: float = 1.0) -> float:
        """Of a portion, on `share` of this slab."""
        scale = self._ops[index].source.scale
        rows = part_of(self._own, index, scale).area / (scale**2 * self._shape.cols)
        return self._costs.seconds(index, share * rows, self._first) / self._parts

    def _attention(self, index: int, op: Attention) -> float:
        """Seconds of a portion on this slab: their part, by FLOPs, of those of whole frames."""
        whole = self._costs.seconds(index, self._shape.rows, self._first) / self._parts
        pixels = self._shape.rows * self._shape.cols * op.source.scale**2
        own = part_of(self._own, index, op.source.scale).area
        return whole * op.frame_flops(own, pixels) / op.frame_flops(pixels, pixels)

    def _parts_of(self, index: int, scale: int) -> tuple[Part, list[tuple[int, Part]]]:
        """This rank's slab of op `index`, and those of the others."""
        others = [(other.rank, part_of(other, index, scale)) for other in self._others]
        return part_of(self._own, index, scale), others

    def _round(self, op: Op, areas: Sequence[tuple[int, int, int]]) -> Round:
        """Messages of so many pixels (given, taken) to and from each other rank; none where there are none."""
        sends = tuple((rank, self._nbytes(op, given)) for rank, given, _ in areas if given)
        receives = tuple((rank, self._nbytes(op, taken)) for rank, _, taken in areas if taken)
        return Round(sends, receives)

    def _deal(self, index: int) -> Round:
        """What the slabs before op `index` and from it on have in common, with those of the others."""
        op = self._ops[index]
        before, theirs_before = self._parts_of(index - 1, op.source.scale)
        after, theirs_after = self._parts_of(index, op.source.scale)
        pairs = zip(theirs_before, theirs_after, strict=True)
        return self._round(op, [(rank, before.common(b), a.common(after)) for (rank, a), (_, b) in pairs])

    def _gather(self, index: int) -> Round:
        """This rank's slab to every other, and theirs."""
        op = self._ops[index]
        own, others = self._parts_of(index, op.source.scale)
        return self._round(op, [(rank, own.area, part.area) for rank, part in others])

    def _halo(self, index: int) -> Round | None:
        """What neighbours read of this slab to run op `index`, and this slab of theirs; None when nothing."""
        op = self._ops[index]
        if not op.margins or not self._others:
            return None
        own, others = self._parts_of(index, op.source.scale)
        halo = self._round(
            op,
            [
                (rank, part.widened(op.margins).common(own), own.widened(op.margins).common(part))
                for rank, part in others
            ],
        )
        return halo if halo.sends or halo.receives else None

    def _nbytes(self, op: Op, area: int) -> int:
        frames = 1 if self._first else op.source.frames // self._parts
        return self._shape.batch * frames * area * op.source.channels * self._shape.element_bytes

    def _edges(self, index: int) -> list[float]:
        """The shares of this slab that neighbours wait for, for op `index`: strips at its sides, corners once."""
        op = self._ops[index]
        own, others = self._parts_of(index, op.source.scale)
        m, height, width = op.margins, own.rows[1] - own.rows[0], own.cols[1] - own.cols[0]
        beside = [other for _, other in others if overlap(other.cols, own.cols)]
        abreast = [other for _, other in others if overlap(other.rows, own.rows)]
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
