"""An assignment: which rank runs which ops on which chunks and which slab of the picture. Imports no torch.

The work of one clip is a box: ops x chunks x picture. A strategy tiles this box into blocks, each with a rank:

    Block(ops=(0, 54), chunks=(0, 48), rank=3)                          # a run of ops: a pipeline stage
    Block(ops=(0, 84), chunks=(7, 8), rank=1)                           # one chunk: a wavefront
    Block(ops=(0, 84), chunks=(0, 48), rank=2, slab=Rect(4, 8, 0, 60))  # some rows: a shard
    Block(ops=(0, 84), chunks=(0, 48), rank=EVERY)                      # each rank for itself

`lowering` derives the messages from the blocks. Blocks that leave a part of the box out are refused, and so are
blocks of two ranks that overlap, except with EVERY or warm_up. The error names the block.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, NamedTuple

from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.vae.ops import LatentShape, Margins, Op
from cosmos3_pipeline.vae.program import Program

EVERY: Final = None  # instead of a rank: each rank computes the block for itself


class Rect(NamedTuple):
    """Rows [top, bottom) and columns [left, right) of a grid."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def area(self) -> int:
        return self.height * self.width

    def common(self, other: Rect) -> Rect | None:
        """The intersection with `other`; None if it is empty."""
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        return Rect(top, bottom, left, right) if top < bottom and left < right else None

    def scaled(self, scale: int, unit: int) -> Rect:
        """This rectangle on a grid that has `scale` rows for every `unit` rows of this grid."""
        return Rect(
            self.top * scale // unit,
            self.bottom * scale // unit,
            self.left * scale // unit,
            self.right * scale // unit,
        )

    def grown(self, margins: Margins, limit: Rect) -> Rect:
        """This rectangle grown by `margins`, but not beyond `limit`."""
        return Rect(
            max(self.top - margins.top, limit.top),
            min(self.bottom + margins.bottom, limit.bottom),
            max(self.left - margins.left, limit.left),
            min(self.right + margins.right, limit.right),
        )


@dataclass(frozen=True)
class Block:
    """`rank` runs the ops [start, stop) on the chunks [start, stop) of a slab of the picture.

    rank: `EVERY` means that each rank computes the block for itself.
    slab: rows and columns in units of 1/`unit` latent row; None is the whole picture. With `unit` > 1 a cut may
    lie within a latent row, at ops whose picture is larger than the latent.
    warm_up: the number of first chunks that only fill the temporal caches. Their results are dropped. The block
    begins with empty caches, like a clip.
    """

    ops: tuple[int, int]
    chunks: tuple[int, int]
    rank: int | None
    slab: Rect | None = None
    unit: int = 1
    warm_up: int = 0


@dataclass(frozen=True)
class Assignment:
    """The blocks of one clip over `ranks` ranks.

    note: one line for a human. Plans add the best possible speed-up to it.
    speed_up: the speed relative to one rank, if the strategy has a better estimate than FLOPs.
    """

    ranks: int
    blocks: tuple[Block, ...]
    note: str = ""
    speed_up: float | None = None

    @classmethod
    def of(
        cls, ranks: int, blocks: Iterable[Block], note: str = "", *, speed_up: float | None = None
    ) -> Assignment:
        return cls(ranks, tuple(blocks), note, speed_up)

    def first_chunks(self, chunks: int) -> Assignment:
        """The assignment of only the first `chunks` chunks of the clip."""
        blocks = [
            replace(block, chunks=(block.chunks[0], min(block.chunks[1], chunks)))
            for block in self.blocks
            if block.chunks[0] + block.warm_up < chunks
        ]
        return replace(self, blocks=tuple(blocks), speed_up=None)


class AssignmentError(Refusal):
    """The blocks are no assignment: some work has no rank or two, or an op cannot be cut at a block's edge."""


class Tile(NamedTuple):
    """A rectangle of the picture and its rank. `rect` / `unit` is reduced, so equal tiles compare equal."""

    rect: Rect
    unit: int
    rank: int | None

    def at(self, scale: int) -> Rect:
        """The rectangle on a grid with `scale` rows per latent row."""
        return self.rect.scaled(scale, self.unit)

    def on(self, rank: int) -> bool:
        """Whether `rank` has this tile."""
        return self.rank is EVERY or self.rank == rank

    def latent(self, whole: LatentShape) -> LatentShape:
        """The shape of this tile of the latent `whole`."""
        return LatentShape(
            whole.batch, whole.frames, self.rect.height, self.rect.width, whole.element_bytes, self.unit
        )


class Span(NamedTuple):
    """The ops [start, stop) of one chunk, with the tiles that make up the picture.

    warming: tiles of ranks that also run these ops, but only to fill their temporal caches.
    """

    start: int
    stop: int
    tiles: tuple[Tile, ...]
    warming: tuple[Tile, ...] = ()


Layout = tuple[Span, ...]  # the spans of one chunk, in order of their ops


def whole_picture(shape: LatentShape, scale: int = 1) -> Rect:
    """All rows and columns of the picture, with `scale` rows per latent row."""
    return Rect(0, shape.rows * scale, 0, shape.cols * scale)


def read_by(op: Op, part: Rect, whole: Rect) -> Rect:
    """The rectangle that `op` reads to compute `part`, both in rows and columns of its input.

    Only this function decides the size of a halo: `op.margins` around `part`.
    """
    return whole if op.reads_whole else part.grown(op.margins, whole)


def layouts(program: Program, shape: LatentShape, assignment: Assignment) -> tuple[Layout, ...]:
    """The layout of every chunk; equal layouts are one object. Raises AssignmentError if a block is wrong."""
    chunks = program.chunks(shape)
    _check_numbers(program, shape, assignment)
    edges = sorted({0, chunks, *(e for b in assignment.blocks for e in (*b.chunks, b.chunks[0] + b.warm_up))})
    found: list[Layout] = []
    known: dict[Layout, Layout] = {}
    for first, last in pairwise(edges):
        active = [b for b in assignment.blocks if b.chunks[0] <= first < b.chunks[1]]
        layout = _layout(program, shape, assignment.blocks, active, first)
        found += [known.setdefault(layout, layout)] * (last - first)
    return tuple(found)


def _layout(
    program: Program, shape: LatentShape, given: Sequence[Block], active: Sequence[Block], chunk: int
) -> Layout:
    edges = sorted({0, len(program), *(e for b in active for e in b.ops)})
    starting: Mapping[int, list[Block]] = defaultdict(list)
    for block in active:
        starting[block.ops[0]].append(block)
    spans: list[Span] = []
    running: list[Block] = []
    for start, stop in pairwise(edges):
        running = [b for b in running if b.ops[1] > start] + starting[start]
        spans.append(_span(shape, start, stop, running, chunk, given))
    return tuple(spans)


def _span(
    shape: LatentShape, start: int, stop: int, blocks: Sequence[Block], chunk: int, given: Sequence[Block]
) -> Span:
    """The tiles of ops that the same `blocks` compute. `given` are all blocks, of which a refusal names one."""
    working = [b for b in blocks if chunk >= b.chunks[0] + b.warm_up]
    tiles = [_tile(b, shape) for b in working]
    where = f"ops {start} to {stop - 1} of chunk {chunk}"
    unit = math.lcm(*(tile.unit for tile in tiles)) if tiles else 1
    rects = [tile.at(unit) for tile in tiles]
    order = sorted(range(len(tiles)), key=lambda i: rects[i])
    for position, i in enumerate(order):
        for j in order[position + 1 :]:
            if rects[j].top >= rects[i].bottom:
                break
            if rects[i].common(rects[j]):
                raise AssignmentError(
                    f"{working[j]} overlaps {working[i]} in {where}",
                    "two ranks would do the same work, and it would be undecided which result counts",
                    "give each part to one rank, or to every rank with rank=EVERY, or drop results with warm_up",
                )
    missing = shape.rows * shape.cols * unit**2 - sum(rect.area for rect in rects)
    if missing:
        near = min(
            working or given,
            key=lambda b: (_distance(b.chunks, chunk), _distance(b.ops, start)),
            default="no block",
        )
        raise AssignmentError(
            f"no rank computes {where} on {missing / unit**2:g} of {shape.rows * shape.cols} latent pixels",
            f"every op has to run on the whole picture of every chunk; nearest is {near}",
            "let the blocks tile ops x chunks x picture",
        )
    warming: list[Tile] = []
    for block in blocks:
        if chunk < block.chunks[0] + block.warm_up:
            tile = _tile(block, shape)
            if tile in tiles or tile in warming:
                raise AssignmentError(
                    f"{block} warms up in {where}",
                    "another block has the same rank run them there anyway, and a rank has one set of caches",
                    "begin the warm-up later, or join the blocks",
                )
            warming.append(tile)
    return Span(start, stop, tuple(tiles[i] for i in order), tuple(warming))


def _distance(within: tuple[int, int], place: int) -> int:
    return max(within[0] - place, place - within[1] + 1, 0)


def _tile(block: Block, shape: LatentShape) -> Tile:
    rect, unit = (block.slab, block.unit) if block.slab is not None else (whole_picture(shape), 1)
    by = math.gcd(unit, *rect)
    return Tile(Rect(*(edge // by for edge in rect)), unit // by, block.rank)


def _check_numbers(program: Program, shape: LatentShape, assignment: Assignment) -> None:
    """Raise AssignmentError for a block outside the box, or with an edge that is no row edge of one of its ops."""
    scales = _scales(program)
    box = {"ops": len(program), "chunks": program.chunks(shape)}
    seen: set[tuple[tuple[int, int], Rect | None, int]] = set()
    for block in assignment.blocks:
        slab, unit, rank = block.slab, block.unit, block.rank
        if not _is_well_formed(block):
            raise AssignmentError(
                f"{block} is not well-formed",
                "ops and chunks are pairs of whole numbers, a slab is a Rect of such, and a latent row has parts",
                "give Block((op, op), (chunk, chunk), rank, Rect(top, bottom, left, right), unit=1)",
            )
        for name, size in box.items():
            start, stop = getattr(block, name)
            if not 0 <= start < stop <= size:
                raise AssignmentError(
                    f"{block} has {name} [{start}, {stop})",
                    f"the {program.direction}r has {size}",
                    f"stay within {size}",
                )
        if rank is not EVERY and not 0 <= rank < assignment.ranks:
            raise AssignmentError(
                f"{block} is for rank {rank}",
                f"there are {assignment.ranks} ranks",
                f"give 0 to {assignment.ranks - 1}, or EVERY",
            )
        if not 0 <= block.warm_up < block.chunks[1] - block.chunks[0]:
            raise AssignmentError(
                f"{block} warms up on {block.warm_up} chunks",
                f"it has {block.chunks[1] - block.chunks[0]}, and the result of at least one must be used",
                "give 0, or fewer than it has",
            )
        cut = (block.ops, slab, unit)
        if slab is None or cut in seen:
            continue
        seen.add(cut)
        rows, cols = shape.rows * unit, shape.cols * unit
        if not (0 <= slab.top < slab.bottom <= rows and 0 <= slab.left < slab.right <= cols):
            raise AssignmentError(
                f"{block} has a slab outside the picture",
                f"the latent has {shape.rows} rows and {shape.cols} columns, of {unit} parts each",
                "give rows and columns within them",
            )
        for scale in set().union(*scales[slice(*block.ops)]):
            if any(edge * scale % unit for edge in slab):
                op = next(i for i in range(*block.ops) if scale in scales[i])
                raise AssignmentError(
                    f"{block} cuts within a row of op {op} ({program.ops[op].name})",
                    f"{scale} of its rows make a latent one, which do not divide into {unit} parts",
                    f"cut at multiples of {unit // math.gcd(unit, scale)} parts there, or give later ops a block "
                    "of their own",
                )


def _is_well_formed(block: Block) -> bool:
    """Whether the fields of `block` have the right types. A dataclass does not check types."""
    pairs = (block.ops, block.chunks)
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs) or not isinstance(
        block.slab, Rect | None
    ):
        return False
    numbers = [*block.ops, *block.chunks, *(block.slab or ()), block.unit, block.warm_up]
    numbers += [] if block.rank is EVERY else [block.rank]
    return all(isinstance(number, int) for number in numbers) and block.unit >= 1


def _scales(program: Program) -> list[set[int]]:
    """For each op the scales of its input and output, and of the shortcuts that are open across it."""
    return [
        {op.target.scale, *(spec.scale for cut in (n, n + 1) for spec in program.carried(cut))}
        for n, op in enumerate(program.ops)
    ]
