"""The decoder of the sound tokenizer by its config alone: layers, tensors and work. Imports no torch.

Sound latents [C, T] become a waveform [2, 1920 T] at 48 kHz: a convolution, five upsampling blocks, a convolution.
Only the width `dec_dim` may differ from the published value. The encoder is never read, because no task has sound
as an input.
Source: `Cosmos3AudioDecoder` in diffusers `models/autoencoders/autoencoder_cosmos3_audio.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cosmos3_pipeline.checkpoint.weights import Part, Weight

SOUND_TOKENIZER = "sound_tokenizer"
SAMPLE_RATE = 48000  # samples per second
CHANNELS = 2
STRIDES = (2, 4, 5, 6, 8)  # in the config's order; the decoder uses them from the last to the first
MULTIPLES = (1, 2, 4, 8, 16)  # of `dec_dim`: channels after each block, from the last block to the first
HOP = 1920  # samples of one latent frame, the product of the strides
EDGE_KERNEL, RESIDUAL_KERNEL = 7, 7
RESIDUAL_UNITS = 3


@dataclass(frozen=True)
class Conv:
    """A convolution with weight norm. A transposed convolution makes `stride` samples of each input sample."""

    name: str
    inputs: int
    outputs: int
    kernel: int
    stride: int = 1
    transposed: bool = False
    bias: bool = True

    @property
    def elements(self) -> int:
        """The number of elements of its kernel."""
        return self.inputs * self.outputs * self.kernel

    def weights(self) -> Iterator[Weight]:
        """The tensors. Direction and length of each filter are stored apart, as `weight_v` and `weight_g`."""
        first, second = (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)
        if self.bias:
            yield Weight(f"{self.name}.bias", (self.outputs,), Part.DECODER)
        yield Weight(f"{self.name}.weight_g", (first, 1, 1), Part.DECODER)
        yield Weight(f"{self.name}.weight_v", (first, second, self.kernel), Part.DECODER)


@dataclass(frozen=True)
class Snake:
    """The activation x + sin²(ax) / b, with a and b of each channel."""

    name: str
    channels: int

    def weights(self) -> Iterator[Weight]:
        yield Weight(f"{self.name}.alpha", (1, self.channels, 1), Part.DECODER)
        yield Weight(f"{self.name}.beta", (1, self.channels, 1), Part.DECODER)


def sound_decoder(dec_dim: int, sound_dim: int) -> Iterator[Conv | Snake]:
    """The layers of a decoder of width `dec_dim` for latents of `sound_dim` channels, in their order."""
    channels = [dec_dim * multiple for multiple in (1, *MULTIPLES)]
    yield Conv("decoder.conv1", sound_dim, channels[-1], EDGE_KERNEL)
    for number, stride in enumerate(reversed(STRIDES)):
        inputs, outputs = channels[-1 - number], channels[-2 - number]
        block = f"decoder.block.{number}"
        yield Snake(f"{block}.snake1", inputs)
        yield Conv(f"{block}.conv_t1", inputs, outputs, 2 * stride, stride, transposed=True)
        for unit in (f"{block}.res_unit{i + 1}" for i in range(RESIDUAL_UNITS)):
            yield Snake(f"{unit}.snake1", outputs)
            yield Conv(f"{unit}.conv1", outputs, outputs, RESIDUAL_KERNEL)
            yield Snake(f"{unit}.snake2", outputs)
            yield Conv(f"{unit}.conv2", outputs, outputs, 1)
    yield Snake("decoder.snake1", dec_dim)
    yield Conv("decoder.conv2", dec_dim, CHANNELS, EDGE_KERNEL, bias=False)


def sound_weights(config: Mapping[str, Any], sound_dim: int) -> tuple[Weight, ...]:
    """The decoder's tensors, by a sound tokenizer's config and the channels of its latents."""
    layers = sound_decoder(int(config["dec_dim"]), sound_dim)
    return tuple(weight for layer in layers for weight in layer.weights())
