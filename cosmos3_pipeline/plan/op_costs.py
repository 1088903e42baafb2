"""Seconds of each op of a program on so many latent rows: measured, or estimated from an accelerator's figures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cosmos3_pipeline.config.schema import Dtype
from cosmos3_pipeline.plan.hardware import Accelerator
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.program import Program


class OpCosts(ABC):
    """What each op of `program` costs one rank."""

    def __init__(self, program: Program) -> None:
        self.program = program

    @abstractmethod
    def seconds(self, index: int, rows: float, first: bool) -> float:
        """Seconds of op `index` for one chunk of `rows` latent rows of the clip's full width.

        `first`: the first chunk, which has one frame everywhere. Slabs of fewer columns count as fewer rows.
        """

    def clip_seconds(self, shape: LatentShape) -> float:
        """Seconds in which one rank runs the whole program on a clip of `shape`."""
        return sum(
            count * self.seconds(index, shape.rows, first)
            for index in range(len(self.program))
            for first, count in ((True, 1), (False, self.program.chunks(shape) - 1))
        )

    def scaled_to(self, total_seconds: float, shape: LatentShape) -> OpCosts:
        """The same shares, such that one rank takes `total_seconds` for a clip of `shape`."""
        return _Scaled(self, total_seconds / self.clip_seconds(shape))


class _Scaled(OpCosts):
    def __init__(self, costs: OpCosts, factor: float) -> None:
        super().__init__(costs.program)
        self._costs = costs
        self._factor = factor

    def seconds(self, index: int, rows: float, first: bool) -> float:
        return self._factor * self._costs.seconds(index, rows, first)


@dataclass(frozen=True)
class _Line:
    """Seconds that grow with the rows: `fixed` + `per_row` x rows. Neither is negative."""

    fixed: float
    per_row: float

    @classmethod
    def through(cls, small: tuple[int, float], large: tuple[int, float]) -> _Line:
        """Through (rows, seconds) at two heights. Where noise would make a part negative, it is zero instead."""
        per_row = 0.0
        if large[0] > small[0]:
            per_row = max(0.0, (large[1] - small[1]) / (large[0] - small[0]))
        fixed = large[1] - per_row * large[0]
        if large[0] == small[0] or fixed < 0:
            return cls(0.0, large[1] / large[0])
        return cls(fixed, per_row)

    def at(self, rows: float) -> float:
        return self.fixed + self.per_row * rows


class MeasuredCosts(OpCosts):
    """From seconds measured on slabs of one or two heights: fixed costs and costs per row of each op."""

    def __init__(
        self,
        program: Program,
        samples: Iterable[tuple[str, int, float, float]],
        *,
        widening: float = 1.0,
    ) -> None:
        """`samples` are (op's name, latent rows, seconds of a first chunk, of a later one).

        For each height the ops in program order, since names repeat. `widening`: latent columns of the clip over
        those of the measurement. Raises ValueError for other samples.
        """
        super().__init__(program)
        heights: dict[int, list[tuple[str, float, float]]] = {}
        for name, rows, first, later in samples:
            heights.setdefault(rows, []).append((name, first, later))
        _check(program, heights)
        small, large = min(heights), max(heights)
        self._widening = widening
        pairs = list(zip(heights[small], heights[large], strict=True))
        self._lines = {
            True: [_Line.through((small, a), (large, b)) for (_, a, _), (_, b, _) in pairs],
            False: [_Line.through((small, a), (large, b)) for (_, _, a), (_, _, b) in pairs],
        }

    def seconds(self, index: int, rows: float, first: bool) -> float:
        return self._lines[first][index].at(rows * self._widening)


def _check(program: Program, heights: dict[int, list[tuple[str, float, float]]]) -> None:
    names = [op.name for op in program.ops]
    if not 1 <= len(heights) <= 2 or min(heights) < 1:
        raise ValueError(
            f"op costs measured at heights of {sorted(heights)} latent rows; a line goes through two points; "
            "measure every op on all latent rows and on half of them"
        )
    for rows, found in heights.items():
        if [name for name, _, _ in found] != names:
            raise ValueError(
                f"op costs of {len(found)} ops at {rows} latent rows; the {program.direction}r has {len(names)} "
                "and looks each up by its place; give one sample of each op at each height, in program order"
            )


class EstimatedCosts(OpCosts):
    """The longer of an op's arithmetic and its memory traffic (input and output once) on an accelerator.

    `fixed_share` of an op's seconds on the whole picture stays whatever the slab; the rest shrinks with its rows.
    """

    def __init__(
        self,
        program: Program,
        shape: LatentShape,
        accelerator: Accelerator,
        dtype: Dtype,
        *,
        fixed_share: float = 0.0,
    ) -> None:
        super().__init__(program)
        self._rows = shape.rows
        self._fixed_share = fixed_share
        rate = accelerator.flops_per_s[dtype] * accelerator.efficiency["vae"]
        self._whole: dict[bool, Sequence[float]] = {}
        for first in (True, False):
            traffic = [
                shape.element_bytes
                * (op.source.elements(shape, first=first) + op.target.elements(shape, first=first))
                for op in program.ops
            ]
            self._whole[first] = [
                max(op.flops(shape, first=first) / rate, nbytes / accelerator.memory_bytes_per_s)
                for op, nbytes in zip(program.ops, traffic, strict=True)
            ]

    def seconds(self, index: int, rows: float, first: bool) -> float:
        shrinking = (1 - self._fixed_share) * rows / self._rows
        return self._whole[first][index] * (self._fixed_share + shrinking)
