"""Blends overlapping tiles in the order and with the rounding of `AutoencoderKLWan.blend_v` and `blend_h`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cosmos3_plugins.tiled.tiles import Tiling


def blend(tiles: Sequence[Tensor], tiling: Tiling, scale: int) -> Tensor:
    """Blend tiles [B, T, h, w, C] with `scale` rows per latent row into [B, T, H, W, C]. Overwrites `tiles`."""
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
    """Fade from the end of `before` into the start of `tile`, over at most `extent` rows or columns. In place.

    diffusers multiplies line by line with Python numbers, which PyTorch applies in float32 before it rounds each
    product to the dtype. This function does the same for all lines at once.
    """
    extent = min(before.shape[dim], tile.shape[dim], extent)
    start = tile.narrow(dim, 0, extent)
    fading = torch.arange(extent, dtype=torch.float64, device=tile.device) / extent
    old = _faded(before.narrow(dim, before.shape[dim] - extent, extent), 1 - fading, dim)
    torch.add(old, _faded(start, fading, dim), out=start)


def _faded(lines: Tensor, weights: Tensor, dim: int) -> Tensor:
    """`lines` x `weights` along `dim`, multiplied in float32 (or float64) and rounded once."""
    ramp = weights.to(torch.promote_types(lines.dtype, torch.float32))
    return (lines * ramp.view(-1, *[1] * (lines.ndim - 1 - dim))).to(lines.dtype)
