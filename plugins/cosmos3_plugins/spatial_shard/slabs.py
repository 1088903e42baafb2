"""How a latent is cut into slabs of rows and columns, and what the slabs send each other. No torch here.

Cuts lie between latent rows (and columns), so at every depth of the VAE a slab starts at a multiple of its scale,
and each stride-2 convolution of the encoder reads the same pairs of rows that it would read without the cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from cosmos3_pipeline.vae.ops import Attention, LatentShape, Margins, Op
from cosmos3_pipeline.vae.program import Program

Span = tuple[int, int]


@dataclass(frozen=True)
class Slab:
    """Latent rows and columns [start, stop) of one owner."""

    rows: Span
    cols: Span

    @property
    def height(self) -> int:
        return self.rows[1] - self.rows[0]

    @property
    def width(self) -> int:
        return self.cols[1] - self.cols[0]

    def latent(self, whole: LatentShape) -> LatentShape:
        """The shape of this part of `whole`."""
        return replace(whole, rows=self.height, cols=self.width)


@dataclass(frozen=True)
class Grid:
    """Slabs in row-major order: every span of `rows` with every span of `cols`."""

    rows: tuple[Span, ...]
    cols: tuple[Span, ...]

    @classmethod
    def of(cls, latent_rows: int, latent_cols: int, down: int, across: int) -> Grid:
        """`down` x `across` slabs whose sizes differ by one row and column at most."""
        return cls(_spans(latent_rows, down), _spans(latent_cols, across))

    def __len__(self) -> int:
        return len(self.rows) * len(self.cols)

    @property
    def cuts_rows(self) -> bool:
        return len(self.rows) > 1

    @property
    def cuts_cols(self) -> bool:
        return len(self.cols) > 1

    def slab(self, index: int) -> Slab:
        row, col = divmod(index, len(self.cols))
        return Slab(self.rows[row], self.cols[col])

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


def slab_flops(program: Program, whole: LatentShape, slab: Slab, start: int, stop: int) -> int:
    """FLOPs of ops [start, stop) on one slab over a clip; attention is done for the whole frame on every slab."""
    later = program.chunks(whole) - 1
    part = slab.latent(whole)
    total = 0
    for op in program.ops[start:stop]:
        seen = whole if isinstance(op, Attention) else part
        total += op.flops(seen, first=True) + (later and later * op.flops(seen, first=False))
    return total


def attention_bytes(program: Program, whole: LatentShape, start: int, stop: int) -> int:
    """Bytes alive during the costliest attention of ops [start, stop): whole frames, q, k, v and what follows."""
    first = program.chunks(whole) == 1
    frames = [
        op.source.elements(whole, first=first) for op in program.ops[start:stop] if isinstance(op, Attention)
    ]
    return 6 * max(frames, default=0) * whole.element_bytes


def picture_bytes(program: Program, part: LatentShape) -> int:
    """Bytes of the 8-bit picture of `part` over a clip."""
    size = part.rows * part.cols * program.spatial**2 * program.picture_channels
    return part.batch * program.picture_frames(part.frames) * size


def moments_bytes(program: Program, part: LatentShape) -> int:
    """Bytes of the encoder's moments of `part` over a clip."""
    return math.prod((part.batch, 2 * program.z_dim, part.frames, part.rows, part.cols, part.element_bytes))
