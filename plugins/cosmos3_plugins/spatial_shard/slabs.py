"""How a latent is cut into slabs of rows and columns, and what the slabs send each other. No torch here.

At the latent's own depth cuts lie between its rows (and columns). Where the picture is larger they may lie within
them, so that 11 latent rows are 11 and 11 halves for two ranks: the decoder deals slabs anew after a doubling of
the picture if that makes the largest one smaller. The encoder begins with the finest cuts and deals anew before a
halving where these would part the rows of which it makes one. A cut never parts rows that an op makes of one row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from cosmos3_pipeline.vae.footprint import activation_bytes
from cosmos3_pipeline.vae.ops import Attention, LatentShape, Margins, Op
from cosmos3_pipeline.vae.program import Program
from cosmos3_pipeline.vae.strategy import Deal

Span = tuple[int, int]


@dataclass(frozen=True)
class Slab:
    """Rows and columns [start, stop) of one owner, in parts of a latent row, `unit` of which make one."""

    rows: Span
    cols: Span
    unit: int = 1

    @property
    def height(self) -> int:
        return self.rows[1] - self.rows[0]

    @property
    def width(self) -> int:
        return self.cols[1] - self.cols[0]

    def latent(self, whole: LatentShape) -> LatentShape:
        """The shape of this part of `whole`."""
        return replace(whole, rows=self.height, cols=self.width, unit=self.unit)

    def at(self, scale: int) -> Slab:
        """The same part of the picture in rows and columns of which `scale` make a latent one."""
        assert all(edge * scale % self.unit == 0 for edge in (*self.rows, *self.cols)), "a cut parts a row"
        rows, cols = ((a * scale // self.unit, b * scale // self.unit) for a, b in (self.rows, self.cols))
        return Slab(rows, cols, scale)

    def common(self, other: Slab) -> Slab | None:
        """What two slabs of one unit have in common, if anything."""
        rows = max(self.rows[0], other.rows[0]), min(self.rows[1], other.rows[1])
        cols = max(self.cols[0], other.cols[0]), min(self.cols[1], other.cols[1])
        return Slab(rows, cols, self.unit) if rows[0] < rows[1] and cols[0] < cols[1] else None


@dataclass(frozen=True)
class Grid:
    """Slabs in row-major order: every span of `rows` with every span of `cols`.

    Both are counted in parts of a latent row (or column), `unit` of which make one.
    """

    rows: tuple[Span, ...]
    cols: tuple[Span, ...]
    unit: int = 1

    @classmethod
    def of(cls, rows: int, cols: int, down: int, across: int, *, unit: int = 1) -> Grid:
        """`down` x `across` slabs of `rows` x `cols` latents, whose sizes differ by one `unit` at most."""
        return cls(_spans(rows * unit, down), _spans(cols * unit, across), unit)

    def __len__(self) -> int:
        return len(self.rows) * len(self.cols)

    def extent(self, scale: int) -> tuple[int, int]:
        """Rows and columns of the whole picture where `scale` of them make a latent one."""
        return self.rows[-1][1] * scale // self.unit, self.cols[-1][1] * scale // self.unit

    @property
    def cuts_rows(self) -> bool:
        return len(self.rows) > 1

    @property
    def cuts_cols(self) -> bool:
        return len(self.cols) > 1

    def slab(self, index: int) -> Slab:
        row, col = divmod(index, len(self.cols))
        return Slab(self.rows[row], self.cols[col], self.unit)

    @property
    def largest(self) -> float:
        """Latent pixels of the largest slab."""
        height, width = (max(b - a for a, b in spans) for spans in (self.rows, self.cols))
        return height * width / self.unit**2

    def neighbours(self, index: int) -> Iterator[tuple[int, int, int]]:
        """(rows down, columns right, index) of the up to eight slabs that touch slab `index`."""
        row, col = divmod(index, len(self.cols))
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                inside = 0 <= row + down < len(self.rows) and 0 <= col + right < len(self.cols)
                if inside and (down or right):
                    yield down, right, (row + down) * len(self.cols) + col + right

    def cut(self, margins: Margins) -> Margins:
        """Of the margins that an op reads, those that may lie on other slabs."""
        top, bottom = (margins.top, margins.bottom) if self.cuts_rows else (0, 0)
        left, right = (margins.left, margins.right) if self.cuts_cols else (0, 0)
        return Margins(top, bottom, left, right)


@dataclass(frozen=True)
class Stretch:
    """The ops [start, stop), which run on the slabs of `grid`."""

    start: int
    stop: int
    grid: Grid


@dataclass(frozen=True)
class Run:
    """A run of ops on slabs. `entering` has the slabs of what comes to its first op."""

    entering: Grid
    stretches: tuple[Stretch, ...]

    @property
    def leaving(self) -> Grid:
        """The slabs of its result."""
        return self.stretches[-1].grid

    def slabs(self, index: int, whole: LatentShape) -> dict[int, LatentShape]:
        """Slab `index` of `whole` by the op from which on it is that."""
        return {one.start: one.grid.slab(index).latent(whole) for one in self.stretches}


def stretches_of(program: Program, start: int = 0, stop: int | None = None) -> list[tuple[int, int, int]]:
    """(start, stop, unit) of parts of the ops [start, stop): cuts lie at multiples of 1/`unit` of a latent row.

    From one part to the next no shortcut is open, so that only the activation has to be dealt anew.
    """
    stop = len(program) if stop is None else stop
    found: list[tuple[int, int, int]] = []
    begin = 0
    for end in range(1, len(program) + 1):
        if len(program.carried(end)) > 1:
            continue
        unit = min(scale for op in program.ops[begin:end] for scale in (op.source.scale, op.target.scale))
        if found and found[-1][2] == unit:
            found[-1] = (found[-1][0], end, unit)
        else:
            found.append((begin, end, unit))
        begin = end
    return [(max(a, start), min(b, stop), unit) for a, b, unit in found if a < stop and b > start]


def run_of(program: Program, latent: Grid, start: int = 0, stop: int | None = None) -> Run:
    """The slabs of the ops [start, stop), given those of the latent; one stretch for each of `stretches_of`.

    From the latent on, they stay as they are from one stretch to the next unless the largest becomes smaller.
    """
    rows, cols = latent.extent(1)
    grids: dict[int, Grid] = {}
    grid = latent
    for _, end, unit in sorted(stretches_of(program), key=lambda part: part[2]):
        finer = Grid.of(rows, cols, len(latent.rows), len(latent.cols), unit=unit)
        if finer.largest < grid.largest:
            grid = finer
        grids[end] = grid

    def of_op(number: int) -> Grid:
        return grids[min(end for end in grids if end > number)]

    parts = stretches_of(program, start, stop)
    return Run(of_op(max(0, start - 1)), tuple(Stretch(a, b, of_op(a)) for a, b, _ in parts))


def _spans(size: int, parts: int) -> tuple[Span, ...]:
    # Rounding down puts the longer spans last, since the root, which is first, also writes the picture.
    edges = [size * i // parts for i in range(parts + 1)]
    return tuple(pairwise(edges))


def inner_edge(start: int, size: int, before: int, after: int, step: int) -> Span:
    """What a neighbour `step` slabs further along one axis reads of this slab's inner [start, start + size).

    `before` and `after` are the margins that every slab reads before and after itself on that axis.
    """
    return {-1: (start, start + after), 0: (start, start + size), 1: (start + size - before, start + size)}[step]


@dataclass(frozen=True)
class Traffic:
    """Payload that one rank hands to others over a clip, as the ledger counts it."""

    bytes: int = 0
    messages: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.bytes + other.bytes, self.messages + other.messages)


def dealing_traffic(program: Program, whole: LatentShape, run: Run, index: int) -> Traffic:
    """What slab `index` sends to the others where slabs are dealt anew."""
    later = program.chunks(whole) - 1
    sent = Traffic()
    grid = run.entering
    for stretch in run.stretches:
        if stretch.grid == grid:
            continue
        spec = program.carried(stretch.start)[0]
        parts = moved(grid, stretch.grid, index, spec.scale)
        area = sum(slab.height * slab.width for _, slab in parts)
        frames = whole.batch * (1 + later * spec.frames)
        messages = len(parts) * program.crossings(stretch.start, whole)
        sent += Traffic(area * frames * spec.channels * whole.element_bytes, messages)
        grid = stretch.grid
    return sent


def moved(before: Grid, after: Grid, index: int, scale: int) -> list[tuple[int, Slab]]:
    """(other, part) of slab `index` of `before` that belong to another slab of `after`, in rows at `scale`."""
    own = before.slab(index).at(scale)
    parts = ((other, own.common(after.slab(other).at(scale))) for other in range(len(after)) if other != index)
    return [(other, part) for other, part in parts if part is not None]


def slab_traffic(program: Program, whole: LatentShape, grid: Grid, index: int, start: int, stop: int) -> Traffic:
    """Halos and attention frames that slab `index` sends to the others of its grid while ops [start, stop) run."""
    later = program.chunks(whole) - 1
    sent = Traffic()
    for number, op in enumerate(program.ops[start:stop], start):
        for first, chunks in ((True, 1), (False, later)):
            elements, messages = _op_traffic(op, whole, grid, index, first=first)
            # An op passes on as many portions as it sees.
            messages *= program.portions_at(number + 1, first=first)
            sent += Traffic(chunks * elements * whole.element_bytes, chunks * messages)
    return sent


def _op_traffic(op: Op, whole: LatentShape, grid: Grid, index: int, *, first: bool) -> tuple[int, int]:
    """(elements, messages) of one chunk."""
    b, t, h, w, c = op.source.shape(grid.slab(index).latent(whole), first=first)
    if isinstance(op, Attention):
        return (len(grid) - 1) * b * t * h * w * c, len(grid) - 1
    margins = grid.cut(op.margins)
    room = op.room(first=first, cut_rows=grid.cuts_rows, cut_cols=grid.cuts_cols).margins
    # Zeros that the op keeps at an uncut side travel with the rest.
    h += room.top + room.bottom - margins.top - margins.bottom
    w += room.left + room.right - margins.left - margins.right
    elements = messages = 0
    for down, right, _ in grid.neighbours(index):
        top, bottom = inner_edge(0, h, margins.top, margins.bottom, down)
        left, stop = inner_edge(0, w, margins.left, margins.right, right)
        area = (bottom - top) * (stop - left)
        elements += b * t * area * c
        messages += area > 0
    return elements, messages


@dataclass(frozen=True)
class SlabWork:
    """What a run of ops on one slab is: FLOPs, peak bytes of activations, what it sends while they run."""

    flops: int
    activation_bytes: int
    sent: Traffic
    entering: LatentShape
    leaving: LatentShape


def slab_work(program: Program, whole: LatentShape, run: Run, index: int) -> SlabWork:
    """The run `run` on slab `index`."""
    grid, slabs = run.entering, run.slabs(index, whole)
    start, stop = run.stretches[0].start, run.stretches[-1].stop
    entering = grid.slab(index).latent(whole)
    peak = activation_bytes(
        program,
        entering,
        start,
        stop,
        cut_rows=grid.cuts_rows,
        cut_cols=grid.cuts_cols,
        deals=slabs,
        whole=whole if len(grid) > 1 else None,
    )
    sent = dealing_traffic(program, whole, run, index)
    flops = 0
    for one in run.stretches:
        sent += slab_traffic(program, whole, one.grid, index, one.start, one.stop)
        flops += slab_flops(program, whole, one.grid.slab(index), one.start, one.stop)
    return SlabWork(
        flops=flops,
        activation_bytes=peak,
        sent=sent,
        entering=entering,
        leaving=run.leaving.slab(index).latent(whole),
    )


def deals(program: Program, latent: Grid, index: int) -> tuple[Deal, ...]:
    """Where slab `index` becomes another in the whole program, beginning with that of the latent."""
    found: list[Deal] = []
    grid = latent
    for one in run_of(program, latent).stretches:
        if one.grid != grid:
            grid, slab = one.grid, one.grid.slab(index)
            found.append(Deal(one.start, slab.unit, slab.rows, slab.cols))
    return tuple(found)


def slab_flops(program: Program, whole: LatentShape, slab: Slab, start: int, stop: int) -> int:
    """FLOPs of ops [start, stop) on one slab over a clip; attention has the keys and values of whole frames."""
    later = program.chunks(whole) - 1
    return sum(
        _flops(op, whole, slab, first=True) + (later and later * _flops(op, whole, slab, first=False))
        for op in program.ops[start:stop]
    )


def _flops(op: Op, whole: LatentShape, slab: Slab, *, first: bool) -> int:
    if not isinstance(op, Attention):
        return op.flops(slab.latent(whole), first=first)
    (b, t, h, w, _), (_, _, height, width, _) = (
        op.source.shape(latent, first=first) for latent in (slab.latent(whole), whole)
    )
    return b * t * op.frame_flops(h * w, height * width)


def picture_bytes(program: Program, part: LatentShape) -> int:
    """Bytes of the 8-bit picture of `part` over a clip."""
    size = part.rows * part.cols * (program.spatial // part.unit) ** 2 * program.picture_channels
    return part.batch * program.picture_frames(part.frames) * size


def moments_bytes(program: Program, part: LatentShape) -> int:
    """Bytes of the encoder's moments of `part` over a clip."""
    return math.prod((part.batch, 2 * program.z_dim, part.frames, part.rows, part.cols, part.element_bytes))
