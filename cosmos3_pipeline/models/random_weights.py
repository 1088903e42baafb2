"""Random weights in place of trained ones. Activations neither vanish nor explode, and the picture is lively.

A tensor's values depend only on its name and the kind of device that draws them. A file can therefore be written
tensor by tensor, in any order.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

SEED = 0
# Elements that are drawn at once. A large tensor is drawn in blocks of whole rows.
BLOCK_ELEMENTS = 2**24
CPU = torch.device("cpu")


def scale_and_mean(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Scale and mean of a tensor's normal numbers. With them, both text and noise level change the prediction."""
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
    """A tensor of a Wan2.2 VAE. From unit noise the decoder of this VAE paints coloured, moving patches."""
    noise = torch.randn(shape, generator=_generator(name, device), device=device)
    sub_pixels = patch_size**2
    if "norm" in name:
        return 1 + 0.1 * noise
    if name.endswith("bias"):
        return 0.1 * noise if name != "decoder.conv_out.bias" else torch.zeros_like(noise)
    scaled = _taper(noise / noise[0].numel() ** 0.5)
    if name.startswith("decoder.up_blocks"):
        if "time_conv" in name:
            # One half makes the even frames, the other half the odd frames. They are similar, because otherwise
            # the picture flickers.
            even, odd = scaled.chunk(2)
            return torch.cat([even, 0.95 * even + 0.31 * odd])
        if ".resample." in name:
            # The parallel shortcut has no weights and turns channels into stripes. This filter must outweigh it.
            return 6 * scaled
    if name == "decoder.conv_out.weight":
        # The input is positive on average, so a filter that does not sum to zero would tint the whole picture. The
        # sub-pixels of a patch are channels here. Their filters are nearly equal, because otherwise the picture
        # would show a grid.
        filters = scaled - scaled.mean(dim=(1, 2, 3, 4), keepdim=True)
        shared = filters[::sub_pixels].repeat_interleave(sub_pixels, dim=0)
        return 0.6 * (0.98 * shared + 0.2 * filters)
    return scaled


def sound_tensor(name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """A tensor of a sound tokenizer, as flat fp32 blocks. From noise it makes a waveform that is not clipped."""
    # The length of each filter; its direction is random. Residual units add little, and the last filter is quiet.
    length = 0.15 if name == "decoder.conv2.weight_g" else 0.3 if name.endswith("conv2.weight_g") else 1.0
    for block in plain_tensor(name, shape):
        yield block.mul_(0.1 * length).add_(length) if name.endswith("weight_g") else block


def _taper(kernel: Tensor) -> Tensor:
    """A conv kernel [out, in, ...] with weaker outer taps, for smooth pictures. Its mean energy is unchanged.

    In time, the taps of past frames are weaker. The first frame has no past, and must be as lively as the others.
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
