"""Random weights that stand in for trained ones: nothing in the model dies or blows up, and its picture is lively.

A tensor's values follow from its name and the kind of device that draws them, so a file may be written tensor by
tensor in any order.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

SEED = 0
# Elements that are drawn at once: a large tensor comes in blocks of whole rows.
BLOCK_ELEMENTS = 2**24
CPU = torch.device("cpu")


def scale_and_mean(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Scale and mean of a tensor's normal numbers, so that text and noise level both change the prediction."""
    if "norm" in name:
        return 0.1, 1.0
    if name == "embed_tokens.weight":
        return 1.0, 0.0
    return (math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1), 0.0


def plain_tensor(name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """A tensor of a transformer, as flat fp32 blocks."""
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    scale, mean = scale_and_mean(name, shape)
    at_once = max(BLOCK_ELEMENTS // columns, 1)
    generator = _generator(name, CPU)
    for start in range(0, rows, at_once):
        noise = torch.randn(min(at_once, rows - start) * columns, generator=generator)
        yield noise.mul_(scale).add_(mean)


def vae_tensor(name: str, shape: tuple[int, ...], *, patch_size: int, device: torch.device = CPU) -> Tensor:
    """A tensor of a Wan2.2 VAE whose decoder paints coloured, moving patches from unit noise."""
    noise = torch.randn(shape, generator=_generator(name, device), device=device)
    sub_pixels = patch_size**2
    if "norm" in name:
        return 1 + 0.1 * noise
    if name.endswith("bias"):
        return 0.1 * noise if name != "decoder.conv_out.bias" else torch.zeros_like(noise)
    scaled = _taper(noise / noise[0].numel() ** 0.5)
    if name.startswith("decoder.up_blocks"):
        if "time_conv" in name:
            # One half makes the even frames, the other the odd ones: alike, or the picture flickers.
            even, odd = scaled.chunk(2)
            return torch.cat([even, 0.95 * even + 0.31 * odd])
        if ".resample." in name:
            # The parallel shortcut has no weights and turns channels into stripes, so this filter must outweigh
            # it.
            return 6 * scaled
    if name == "decoder.conv_out.weight":
        # Its input is positive on average, so a filter that does not sum to zero would tint the whole picture. The
        # sub-pixels of a patch are channels here. They get equal filters, or the picture would show a grid.
        filters = scaled - scaled.mean(dim=(1, 2, 3, 4), keepdim=True)
        shared = filters[::sub_pixels].repeat_interleave(sub_pixels, dim=0)
        return 0.6 * (0.98 * shared + 0.2 * filters)
    return scaled


def sound_tensor(name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """A tensor of a sound tokenizer, as flat fp32 blocks: noise becomes a waveform that is not cut."""
    # The length of each filter, whose direction is random: residual units add little, and the last one is quiet.
    length = 0.15 if name == "decoder.conv2.weight_g" else 0.3 if name.endswith("conv2.weight_g") else 1.0
    for block in plain_tensor(name, shape):
        yield block.mul_(0.1 * length).add_(length) if name.endswith("weight_g") else block


def _taper(kernel: Tensor) -> Tensor:
    """A conv kernel [out, in, ...] with weaker outer taps, for smooth pictures, and the same energy on average.

    The past's taps are weaker as well: before the first frame there is nothing, and it shall be as lively.
    """
    for dim, size in list(enumerate(kernel.shape))[2:]:
        if size == 3:
            past = kernel.ndim == 5 and dim == 2
            values = (0.4, 0.6, 1.0) if past else (0.8, 1.0, 0.8)
            taps = torch.tensor(values, dtype=kernel.dtype, device=kernel.device)
            shape = [1] * kernel.ndim
            shape[dim] = size
            kernel = kernel * (taps * (size / taps.square().sum()).sqrt()).view(shape)
    return kernel


def _generator(name: str, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(SEED + zlib.crc32(name.encode()))
