"""The sound stage of a plan: rank 0 decodes the sound latents to a waveform. Its work, memory and time."""

from __future__ import annotations

from dataclasses import dataclass

from cosmos3_pipeline.checkpoint.sound import Snake, sound_decoder
from cosmos3_pipeline.config.schema import Config
from cosmos3_pipeline.denoise.cost import Wire
from cosmos3_pipeline.planning.geometry import sound_frames
from cosmos3_pipeline.planning.hardware import accelerator_of
from cosmos3_pipeline.planning.stage import RankStage
from cosmos3_pipeline.planning.vae import ELEMENT_BYTES

# Reads and writes of an input by the five kernels of a snake activation: scale, sine, square, scale, add.
SNAKE_PASSES = 11
# Tensors that a residual unit holds at once: its input, its first convolution's output, and two of an activation.
# The input of the unit's block is held as well.
UNIT_TENSORS = 4


@dataclass(frozen=True)
class SoundCost:
    """The cost of decoding one sound, in elements.

    `held` is the peak beside the weights. `moved` is what the kernels read and write. `largest_kernel`, of a
    convolution, is held once more while the weights are loaded, see `models.sound`.
    """

    weights: int
    largest_kernel: int
    held: int
    moved: int
    flops: int

    @classmethod
    def of(cls, dec_dim: int, sound_dim: int, frames: int) -> SoundCost:
        """The cost of `frames` latent frames of `sound_dim` channels in a decoder of width `dec_dim`."""
        weights = largest = held = moved = flops = entered = 0
        length = frames
        for layer in sound_decoder(dec_dim, sound_dim):
            if isinstance(layer, Snake):
                weights += 2 * layer.channels
                moved += SNAKE_PASSES * layer.channels * length
                continue
            read = layer.inputs * length
            entered = read if layer.transposed else entered
            flops += 2 * layer.elements * length
            length *= layer.stride
            moved += read + layer.outputs * length
            held = max(held, UNIT_TENSORS * layer.outputs * length + entered)
            weights += layer.elements + layer.outputs * layer.bias
            largest = max(largest, layer.elements)
        return cls(weights, largest, held, moved, flops)


def sound_stage(cfg: Config, *, is_root: bool, weights: int, text: int, latents: int) -> RankStage:
    """The sound stage on a rank that also holds bytes of other `weights`, of prompts (`text`) and of `latents`.

    Rank 0 (`is_root`) decodes alone. The other ranks go on to the decode stage and wait there for rank 0.
    """
    frames, element_bytes = sound_frames(cfg), ELEMENT_BYTES[cfg.model.vae_dtype]
    accelerator = accelerator_of(cfg)
    cost = SoundCost(0, 0, 0, 0, 0)
    if is_root:
        assert cfg.model.transformer.sound_dim is not None
        cost = SoundCost.of(cfg.model.sound_tokenizer.dec_dim, cfg.model.transformer.sound_dim, frames)
    own = cost.weights * element_bytes
    return RankStage(
        flops=cost.flops,
        weight_bytes=weights + own,
        text_bytes=text,
        activation_bytes=latents + max(cost.held, cost.largest_kernel) * element_bytes,
        sent=Wire(),
        seconds={
            "compute": cost.flops / (accelerator.flops_per_s[cfg.model.vae_dtype] * accelerator.efficiency["vae"]),
            "memory": cost.moved * element_bytes / accelerator.memory_bytes_per_s,
            "weights": own / accelerator.host_bytes_per_s,
            "link": 0.0,
        },
        share={"sound_tokens": frames},
    )
