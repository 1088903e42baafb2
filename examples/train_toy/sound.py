"""The toy's sound: a tone for each shape, the higher the shape is in the picture, the higher the tone.

The sound tokenizer is not trained. Its decoder is diffusers' `Cosmos3AVAEAudioTokenizer`, and its weights are
constructed so that it is an oscillator. A latent frame lasts 40 ms, and `STEPS_PER_UNIT` times the mean of its
channels of one ear is the number of the tone. Tone n has MIDDLE + n cycles in a latent frame. The number of cycles
is whole, so that a tone continues without a click from one latent frame to the next.
"""

from __future__ import annotations

import math

import torch
from diffusers import Cosmos3AVAEAudioTokenizer
from scenes import Scene, paths
from torch import Tensor, nn

from cosmos3_pipeline.checkpoint.sound import CHANNELS, HOP, SAMPLE_RATE, STRIDES
from cosmos3_pipeline.models.sound import new_sound_tokenizer

SOUND = {"sound_gen": True, "sound_dim": 4, "sound_latent_fps": SAMPLE_RATE / HOP}
DIMENSIONS = {"dec_dim": 5, "vocoder_input_dim": 4, "encoder_enabled": False}
LATENTS_PER_SECOND = SAMPLE_RATE // HOP
MIDDLE, TONES = 24, 12  # cycles in a latent frame at half height; tones from there to the top, and to the bottom
STEPS_PER_UNIT = 3.0  # so that latents have a deviation of about 1
LOUDNESS = 0.25  # of 1, for each ear
# Two of the four channels are one ear's. The second has the other sign. There are few channels, because the
# transformer has to learn the noise of each: with 64 channels it had learnt none after 900 steps.
SIGNS = torch.tensor([1.0, -1.0])
# The tone's number is rounded by x - sum c sin(2 pi m x) / (2 pi m). With these c, for m = 1, 2, 3, the first six
# derivatives are zero at whole numbers.
ROUNDING = (1.5, -0.6, 0.1)


def sound_latents(scene: Scene, frames: int, fps: float) -> Tensor:
    """The sound of the clip of `scene` as latents [4, T]: the first shape on the left, the last on the right."""
    length = math.ceil(int(frames / fps * SAMPLE_RATE) / HOP)
    seconds = (torch.arange(length) + 0.5) / LATENTS_PER_SECOND
    rows = [row for row, _ in paths(scene, (seconds * fps / (frames - 1)).clamp(max=1) - 0.5)]
    ears = [(0.5 - rows[ear]).mul(2 * TONES) / STEPS_PER_UNIT for ear in (0, -1)]
    return torch.cat([SIGNS[:, None] * ear for ear in ears])


def pitch_of(row: Tensor) -> Tensor:
    """The pitch in Hz of a shape at this share of the picture's height, before it is rounded to a tone."""
    return LATENTS_PER_SECOND * (MIDDLE + 2 * TONES * (0.5 - row))


def make_sound_tokenizer() -> Cosmos3AVAEAudioTokenizer:
    """The decoder. From block to block each ear has two channels: cycles per latent frame, and cycles so far.

    A block with stride s repeats each sample s times, and adds to the second channel a ramp over these s samples.
    After the last block the second channel is the phase. A snake activation computes its sine.
    """
    tokenizer = new_sound_tokenizer(DIMENSIONS)
    for parameter in tokenizer.parameters():
        parameter.requires_grad_(False)
    for module in tokenizer.modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            module.weight_v.fill_(1.0)  # the norm of a filter divides, so it cannot be zero
            module.weight_g.zero_()
            if module.bias is not None:
                module.bias.zero_()
    for name, parameter in tokenizer.named_parameters():
        if name.endswith((".alpha", ".beta")):
            # sin(exp(-30) x)^2 / exp(30) is 0 in float32, so that the activation changes nothing.
            parameter.fill_(-30.0 if name.endswith("alpha") else 30.0)
    decoder = tokenizer.decoder
    sources, parts = _read_and_round(decoder), 1
    for block, stride in zip(decoder.block, reversed(STRIDES), strict=True):
        _stretch(block.conv_t1, sources, stride, parts, first=parts == 1)
        sources = [[(2 * ear, 1.0)] for ear in range(CHANNELS)]
        parts *= stride
    _sine(decoder)
    return tokenizer.eval()


def _read_and_round(decoder: nn.Module) -> list[list[tuple[int, float]]]:
    """Set the first convolution and activation. For each ear: channels, and how often each adds to the cycles."""
    conv, snake = decoder.conv1, decoder.block[0].snake1
    values, middle = torch.zeros_like(conv.weight_v), conv.kernel_size[0] // 2
    one, sums = conv.out_channels - 1, []
    conv.bias[one] = 1.0
    for ear in range(CHANNELS):
        own = slice(ear * len(SIGNS), (ear + 1) * len(SIGNS))
        first = ear * (1 + len(ROUNDING))
        constant = float(MIDDLE)
        sums.append([(first, 1.0 - len(ROUNDING))])
        for m in range(len(ROUNDING) + 1):
            channel = first + m
            values[channel, own, middle] = SIGNS * STEPS_PER_UNIT / len(SIGNS)
            if m == 0:
                continue
            # The activation gives y + size (1 - cos(2 pi m y)). With y = x + offset this is x + offset + size, and
            # - size sin(2 pi m x) or + size sin(2 pi m x).
            size = abs(ROUNDING[m - 1]) / (2 * math.pi * m)
            offset = -math.copysign(1 / (4 * m), ROUNDING[m - 1])
            conv.bias[channel] = offset
            snake.alpha[0, channel, 0] = math.log(math.pi * m)
            snake.beta[0, channel, 0] = -math.log(2 * size)
            sums[ear].append((channel, 1.0))
            constant -= offset + size
        sums[ear].append((one, constant))
    _store(conv, values)
    return sums


def _stretch(
    conv: nn.ConvTranspose1d, sources: list[list[tuple[int, float]]], stride: int, parts: int, *, first: bool
) -> None:
    """Set a block's upsampling. A latent frame has `parts` samples before it. `sources` add up to the cycles."""
    values = torch.zeros_like(conv.weight_v)
    inside = slice(conv.padding[0], conv.padding[0] + stride)  # the taps of the samples that one sample becomes
    for ear, own in enumerate(sources):
        cycles, phase = 2 * ear, 2 * ear + 1
        for channel, times in own:
            values[channel, cycles, inside] = times
            values[channel, phase, inside] = times * torch.arange(stride) / (parts * stride)
        if not first:
            values[phase, phase, inside] = 1.0
    _store(conv, values)


def _sine(decoder: nn.Module) -> None:
    """Let the last upsampling give every phase twice, and set the last activation and convolution."""
    last, snake, conv = decoder.block[-1].conv_t1, decoder.snake1, decoder.conv2
    stretched = last.weight_g * last.weight_v / last.weight_v.flatten(1).norm(dim=1).view(-1, 1, 1)
    changed, values = torch.zeros_like(stretched), torch.zeros_like(conv.weight_v)
    one, middle = last.out_channels - 1, conv.kernel_size[0] // 2
    last.bias[one] = 1.0
    for ear in range(CHANNELS):
        plain, waved = 2 * ear, 2 * ear + 1
        changed[:, plain] = changed[:, waved] = stretched[:, 2 * ear + 1]
        # sin(pi (phase + 1/4))^2 = (1 + sin(2 pi phase)) / 2. It begins at 0 in every latent frame.
        last.bias[plain] = last.bias[waved] = 0.25
        snake.alpha[0, waved, 0], snake.beta[0, waved, 0] = math.log(math.pi), 0.0
        for channel, times in ((waved, 2.0), (plain, -2.0), (one, -1.0)):
            values[ear, channel, middle] = LOUDNESS * times
    _store(last, changed)
    _store(conv, values)


def _store(conv: nn.Conv1d | nn.ConvTranspose1d, values: Tensor) -> None:
    """Store `values` as direction and length. A filter of zeros keeps any direction, and has length 0."""
    length = values.flatten(1).norm(dim=1).view(-1, 1, 1)
    conv.weight_g.copy_(length)
    conv.weight_v.copy_(torch.where(length > 0, values, torch.ones_like(values)))
