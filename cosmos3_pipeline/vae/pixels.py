"""Conversions between the layouts of diffusers and of the ops: chunks of latents and pictures, and bytes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cosmos3_pipeline.distributed.host_path import takes_host_path
from cosmos3_pipeline.fused.vae import plain_picture_bytes
from cosmos3_pipeline.vae.assignment import Rect
from cosmos3_pipeline.vae.program import ENCODE_CHUNK

# "float": [B, 3, frames, H, W] in the VAE's dtype in [-1, 1]; "uint8": [B, frames, H, W, 3] in 0..255.
Pixels = Literal["float", "uint8"]


def latent_chunk(z: Tensor, index: int, part: Rect) -> Tensor:
    """The rectangle `part` of latent frame `index` of z [B, C, T, h, w], channels-last [B, 1, h, w, C]."""
    frame = z[:, :, index : index + 1, part.top : part.bottom, part.left : part.right]
    return frame.permute(0, 2, 3, 4, 1).contiguous()


def picture_chunks(frames: int) -> int:
    """The number of chunks that are encoded. As in diffusers, frames after the last whole chunk are dropped."""
    return 1 + (frames - 1) // ENCODE_CHUNK


def picture_chunk(x: Tensor, index: int, part: Rect) -> Tensor:
    """The rectangle `part` of chunk `index` of x [B, 3, F, H, W]: the first frame, or four frames; contiguous."""
    start = 1 + ENCODE_CHUNK * (index - 1) if index else 0
    frames = x[:, :, start : start + (ENCODE_CHUNK if index else 1)]
    return frames[..., part.top : part.bottom, part.left : part.right].contiguous()


def to_uint8(picture: Tensor) -> Tensor:
    """[B, 3, F, H, W] in [-1, 1] to bytes [B, F, H, W, 3], equal to the bytes that diffusers writes."""
    if takes_host_path(picture):
        return plain_picture_bytes(picture)
    found: Tensor = torch.ops.cosmos3.picture_bytes(picture.contiguous())
    return found


def as_pixels(picture: Tensor, pixels: Pixels) -> Tensor:
    """The picture [B, 3, F, H, W] unchanged, or as bytes [B, F, H, W, 3]."""
    return to_uint8(picture) if pixels == "uint8" else picture
