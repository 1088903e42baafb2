"""Joining overlapping tiles, in the order and with the roundings of `AutoencoderKLWan.blend_v` and `blend_h`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cosmos3_plugins.tiled.tiles import Tiling


def blend(tiles: Sequence[Tensor], tiling: Tiling, scale: int) -> Tensor:
    """Tiles [B, T, h, w, C] with `scale` rows per latent row to the whole [B, T, H, W, C]. Overwrites `tiles`."""
    b, t, _, _, c = tiles[0].shape
    whole = tiles[0].new_empty(b, t, tiling.rows.size * scale, tiling.cols.size * scale, c)
    across = len(tiling.cols.spans)
    for index, tile in enumerate(tiles):
        row, col = divmod(index, across)
        if row:
            _fade(tiles[index - across], tile, tiling.rows.overlap * scale, dim=2)
        if col:
            _fade(tiles[index - 1], tile, tiling.cols.overlap * scale, dim=3)
        kept = tile[:, :, : tiling.rows.stride * scale, : tiling.cols.stride * scale]
        top, left = row * tiling.rows.stride * scale, col * tiling.cols.stride * scale
        whole[:, :, top : top + kept.shape[2], left : left + kept.shape[3]].copy_(kept)
    return whole


def _fade(before: Tensor, tile: Tensor, extent: int, *, dim: int) -> None:
    """Fade the start of `tile` from the end of `before`, over at most `extent` rows or columns.

    Line by line with scalar weights: a tensor of weights would be rounded to the dtype first.
    """
    extent = min(before.shape[dim], tile.shape[dim], extent)
    start = before.shape[dim] - extent
    for i in range(extent):
        line = tile.select(dim, i)
        line.copy_(before.select(dim, start + i) * (1 - i / extent) + line * (i / extent))
