"""Overlapping tiles, which ranks compute independently and the root blends.

The picture is the same as with diffusers' `enable_tiling()`. It differs from the untiled VAE's picture, because a
tile does not see its neighbours: its borders and its attention differ. Overlaps are computed twice. Decoding
streams, so the temporal caches of all tiles of a rank are in memory at once. With few ranks this takes about as
much memory as no tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cosmos3_pipeline.plugin_api import (
    Direction,
    Exactness,
    LatentShape,
    OwnRunner,
    Program,
    RankShare,
    Runner,
    StrategyError,
    StrategyPlan,
    account,
)
from cosmos3_plugins.tiled.tiles import Axis, Tiling, clip_elements, kept_elements, of_tile, tile_elements

if TYPE_CHECKING:
    from cosmos3_pipeline.plugin_api import BoundVae, Comm

__all__ = ["Tiled"]


@dataclass
class Tiled(OwnRunner):
    """Tiles of `tile_sample_min_*` that start every `tile_sample_stride_*`, with diffusers' names and defaults.

    The unit is pixels for decode. For encode it is patches, as in diffusers: with patch_size 2 a tile of 256 is
    512 pixels high.
    """

    tile_sample_min_height: int = 256
    tile_sample_min_width: int = 256
    tile_sample_stride_height: int = 192
    tile_sample_stride_width: int = 192

    name: ClassVar[str] = "tiled"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    def tiling(self, program: Program, shape: LatentShape) -> Tiling:
        """The tiles of a latent. Raises StrategyError for settings that cut latent rows or leave gaps."""
        patch = 1 if program.direction == "decode" else program.patch
        unit = program.spatial // patch
        rows, cols = self._axis("height", shape.rows, unit), self._axis("width", shape.cols, unit)
        return Tiling.of(rows, cols, patch=patch)

    def _axis(self, name: str, size: int, unit: int) -> Axis:
        keys = {part: f"tile_sample_{part}_{name}" for part in ("min", "stride")}
        values = {part: int(getattr(self, key)) for part, key in keys.items()}
        for part, value in values.items():
            if value < unit or value % unit:
                raise StrategyError(
                    f"tiled.{keys[part]}={value}",
                    f"one latent row or column is {unit}, and a tile starts and ends between two of them",
                    f"give {max(1, round(value / unit)) * unit}",
                )
        if values["stride"] > values["min"]:
            raise StrategyError(
                f"tiled.{keys['stride']}={values['stride']} with {keys['min']}={values['min']}",
                f"between two tiles {values['stride'] - values['min']} would be missing",
                f"give a stride of {values['min']} or less",
            )
        return Axis(size, values["min"] // unit, values["stride"] // unit)

    def plan(self, program: Program, shape: LatentShape, ranks: int) -> StrategyPlan:
        """The work of each rank for its tiles. Raises StrategyError for more ranks than tiles."""
        tiling = self.tiling(program, shape)
        if ranks > len(tiling):
            down, across = len(tiling.rows.spans), len(tiling.cols.spans)
            raise StrategyError(
                f"tiled over {ranks} ranks",
                f"a latent of {shape.rows} x {shape.cols} has {down} x {across} = {len(tiling)} tiles of "
                f"{tiling.rows.tile} x {tiling.cols.tile} and each rank needs one",
                f"use no more than {len(tiling)}, or smaller tile_sample_min_* and tile_sample_stride_*",
            )
        dealt = tiling.dealt(ranks)
        shares = tuple(self._share(program, shape, tiling, dealt, rank) for rank in range(ranks))
        flops = program.flops(shape)
        note = (
            f"{len(tiling)} tiles with {sum(share.flops for share in shares) / flops - 1:.0%} computed twice: "
            f"at best {flops / max(share.flops for share in shares):.2f} times one untiled rank"
        )
        slowest = max(share.flops for share in shares)
        return StrategyPlan(self.name, program.direction, self.exactness, shares, note, None, slowest)

    def _share(
        self, program: Program, shape: LatentShape, tiling: Tiling, dealt: tuple[tuple[int, ...], ...], rank: int
    ) -> RankShare:
        own = [tiling.latent(tile, shape) for tile in dealt[rank]]
        element, decodes = shape.element_bytes, program.direction == "decode"
        sent = messages = 0
        if rank:
            sent = element * sum(clip_elements(program, part) for part in own)
            messages = len(own) * (program.chunks(shape) if decodes else 1)
        elif len(dealt) > 1 and not decodes:
            sent, messages = element * clip_elements(program, shape), 1
        spans = [tiling.spans(tile) for tile in dealt[rank]]
        rows, cols = ((min(s[i][0] for s in spans), max(s[i][1] for s in spans)) for i in (0, 1))
        return RankShare(
            rank=rank,
            ops=(0, len(program)),
            rows=rows,
            cols=cols,
            flops=sum(program.flops(part) for part in own),
            weight_bytes=program.weight_elements() * element,
            folded_bytes=sum(op.folded_elements for op in program.ops) * element,
            activation_bytes=self._peak(program, shape, tiling, own, root=rank == 0),
            sent_bytes=sent,
            sent_messages=messages,
        )

    @staticmethod
    def _peak(program: Program, shape: LatentShape, tiling: Tiling, own: list[LatentShape], *, root: bool) -> int:
        """Bytes alive at the worst moment: while the largest tile runs, or on the root while tiles are blended."""
        element, decodes = shape.element_bytes, program.direction == "decode"
        running = max(account(of_tile(program, part))[0].peak_bytes for part in set(own))
        if not decodes:
            everyone = [tiling.latent(tile, shape) for tile in range(len(tiling))] if root else own
            finished = sum(clip_elements(program, part) for part in everyone)
            return max(running + element * sum(clip_elements(program, p) for p in own[1:]), 2 * element * finished)
        first = program.chunks(shape) == 1
        largest = max(own, key=lambda part: part.rows * part.cols)
        others = [part for part in own if part is not largest]
        kept = element * kept_elements(program, others)
        tiles = [tiling.latent(tile, shape) for tile in range(len(tiling))] if root else own
        finished = element * sum(tile_elements(program, part, first=first) for part in tiles)
        whole = element * tile_elements(program, shape, first=first)
        blending = element * kept_elements(program, own) + finished + 2 * whole
        return max(running + kept + finished, blending if root else 0)

    def runner(self, vae: BoundVae, comm: Comm, direction: Direction) -> Runner:
        """The runner of this rank's tiles."""
        from cosmos3_plugins.tiled.runner import TiledRunner

        return TiledRunner(vae, comm, direction, self)
