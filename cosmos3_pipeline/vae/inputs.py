"""Checks of a latent or a picture before the VAE uses it."""

from __future__ import annotations

import torch
from torch import Tensor

from cosmos3_pipeline.distributed.host_path import takes_host_path
from cosmos3_pipeline.errors import Problem, Refusal
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.pixels import picture_chunks
from cosmos3_pipeline.vae.program import Program


class VaeInputError(Refusal):
    """A latent or picture that the VAE cannot take. Raised on every rank of the group."""


def latent_shape(program: Program, tensor: Tensor) -> LatentShape:
    """The latent's shape for an input of `program`: latents [B, C, T, h, w] or a picture [B, 3, F, H, W]."""
    batch, _, frames, rows, cols = tensor.shape
    if program.direction == "encode":
        frames = 1 + (picture_chunks(frames) - 1) * program.latents_per_chunk
        rows, cols = rows // program.spatial, cols // program.spatial
    return LatentShape(batch, frames, rows, cols, tensor.element_size(), on_host=takes_host_path(tensor))


def problem_of(
    program: Program, tensor: Tensor, *, dtype: torch.dtype, device: torch.device, one_clip: bool
) -> Problem | None:
    """The problem with `tensor` as the input of `program`; None if there is none."""
    decode = program.direction == "decode"
    what = "latent" if decode else "picture"
    channels = program.z_dim if decode else program.picture_channels
    shape = list(tensor.shape)
    if tensor.ndim != 5 or tensor.numel() == 0:
        return Problem(
            f"the {what} has shape {shape}",
            "the VAE takes [batch, channels, frames, rows, columns], none of them 0",
            f"give a tensor like [1, {channels}, 1, {64 if not decode else 4}, {64 if not decode else 4}]",
        )
    if shape[1] != channels:
        return Problem(
            f"the {what} has {shape[1]} channels (shape {shape})",
            f"this VAE's {program.direction}r takes {channels}",
            f"give [batch, {channels}, frames, rows, columns]",
        )
    if one_clip and shape[0] != 1:
        return Problem(
            f"the latent has batch {shape[0]}",
            "decode_stream yields the frames of one clip",
            "decode the clips one after the other, or use decode",
        )
    if tensor.dtype != dtype or tensor.device != device:
        return Problem(
            f"the {what} is {tensor.dtype} on {tensor.device}",
            f"the VAE's weights are {dtype} on {device}",
            f"convert it with .to({device.type!r}, {dtype})",
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        return Problem(
            f"the {what} requires grad",
            "the VAE is for inference, and its results have no gradient",
            f"call it under torch.no_grad(), give {what}.detach(), or use the AutoencoderKLWan that it was made "
            "from",
        )
    step = program.spatial
    if not decode and (shape[3] % step or shape[4] % step):
        rows, cols = (max(step, round(size / step) * step) for size in shape[3:])
        return Problem(
            f"the picture is {shape[3]} x {shape[4]} pixels",
            f"one latent row or column is {step} pixels, so both must be multiples of {step}",
            f"resize it to {rows} x {cols}",
        )
    # Frame by frame, because the check takes more memory than its input.
    if not bool(torch.stack([torch.isfinite(frame).all() for frame in tensor.unbind(2)]).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        return Problem(
            f"the {what} has {bad} of {tensor.numel()} values that are NaN or infinite",
            "every pixel that depends on them would be lost",
            "look at what made it: a finite latent decodes",
        )
    return None
