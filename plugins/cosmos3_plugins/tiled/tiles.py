"""The positions of the overlapping tiles of a latent, and the tiles of each rank. Imports no torch.

The tiles are those of `AutoencoderKLWan.tiled_decode` and `tiled_encode` in diffusers 0.42.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cosmos3_pipeline.plugin_api import Assignment, Block, LatentShape, Lowered, Program, lower


@dataclass(frozen=True)
class Axis:
    """The tiles along rows or columns of the latent, at every multiple of `stride`, each at most `tile` long."""

    size: int
    tile: int
    stride: int

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The latent rows or columns [start, stop) of each tile; the last ones may be shorter."""
        return tuple((at, min(at + self.tile, self.size)) for at in range(0, self.size, self.stride))

    @property
    def overlap(self) -> int:
        """Latent rows or columns in which a tile is blended with the previous tile."""
        return self.tile - self.stride


@dataclass(frozen=True)
class Tiling:
    """Tiles in row-major order: every span of `rows` with every span of `cols`."""

    rows: Axis
    cols: Axis

    @classmethod
    def of(cls, rows: Axis, cols: Axis, *, patch: int = 1) -> Tiling:
        """The tiling of a latent; a single tile if diffusers does not tile, because the picture fits into one.

        For the encoder diffusers compares the picture's size in pixels with the tile's size in patches. `patch`
        reproduces this.
        """
        if rows.size * patch <= rows.tile and cols.size * patch <= cols.tile:
            return cls(*(Axis(axis.size, axis.size, axis.size) for axis in (rows, cols)))
        return cls(rows, cols)

    def __len__(self) -> int:
        return len(self.rows.spans) * len(self.cols.spans)

    def spans(self, index: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The latent rows and columns of tile `index`."""
        row, col = divmod(index, len(self.cols.spans))
        return self.rows.spans[row], self.cols.spans[col]

    def latent(self, index: int, whole: LatentShape) -> LatentShape:
        """The shape of tile `index` of `whole`."""
        (top, bottom), (left, right) = self.spans(index)
        return replace(whole, rows=bottom - top, cols=right - left)

    def dealt(self, ranks: int) -> tuple[tuple[int, ...], ...]:
        """The tiles of each rank, in order. They are dealt from the largest on, each to the least busy rank.

        Among equally busy ranks the last one gets the tile, because rank 0 also blends.
        """
        areas = [
            (bottom - top) * (right - left) for (top, bottom), (left, right) in map(self.spans, range(len(self)))
        ]
        load, dealt = [0] * ranks, [list[int]() for _ in range(ranks)]
        for index in sorted(range(len(self)), key=lambda i: (-areas[i], i)):
            rank = min(range(ranks), key=lambda r: (load[r], -r))
            load[rank] += areas[index]
            dealt[rank].append(index)
        return tuple(tuple(sorted(tiles)) for tiles in dealt)


def on_tiles(program: Program) -> Program:
    """The ops that run on tiles: all but the decoder's last op, which makes and clamps the whole picture."""
    return replace(program, ops=program.ops[:-1]) if program.direction == "decode" else program


def of_tile(program: Program, part: LatentShape) -> Lowered:
    """The actions of one rank for one tile, without other ranks."""
    runs = on_tiles(program)
    return lower(runs, part, Assignment.of(1, [Block((0, len(runs)), (0, runs.chunks(part)), 0)]))


def tile_elements(program: Program, part: LatentShape, *, first: bool) -> int:
    """Elements of one chunk of a finished tile, before it is blended."""
    return on_tiles(program).ops[-1].target.elements(part, first=first)


def clip_elements(program: Program, part: LatentShape) -> int:
    """Elements of all chunks of a finished tile, before it is blended."""
    later = program.chunks(part) - 1
    return tile_elements(program, part, first=True) + later * tile_elements(program, part, first=False)


def kept_elements(program: Program, parts: Sequence[LatentShape]) -> int:
    """Elements of the frames that `parts` keep from one chunk for the next."""
    return sum(
        op.cached_frames * op.source.elements(part, first=True)
        for part in parts
        for op in program.ops
        if part.frames > 1
    )
