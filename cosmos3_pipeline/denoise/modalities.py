"""The modalities of the generation pathway: vision, sound and actions.

The tokens of all modalities form one sequence, vision first, and pass through the same layers. This module has the
differences: how latents become tokens, how tokens enter and leave the model, and how predictions become latents
again. Source: `Cosmos3OmniTransformer.forward` in diffusers `models/transformers/transformer_cosmos3.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import Cosmos3OmniTransformer
from torch import Tensor

TokenShape = tuple[int, int, int]


@dataclass(frozen=True)
class Items:
    """The items of one modality in a sequence: clips (control clips first), one sound, or one list of actions.

    `shapes` has the tokens (frames, rows, columns) of each item, and `noisy_frames` the frames that are denoised.
    `noisy` has the positions of all denoised tokens in the joint sequence, which begins with the prompt. `domain`
    is the embodiment whose weights project the actions.
    """

    modality: Modality
    shapes: list[TokenShape]
    noisy_frames: list[Tensor]
    noisy: Tensor
    domain: int | None = None

    @property
    def tokens(self) -> int:
        return sum(frames * rows * cols for frames, rows, cols in self.shapes)


class Modality(Protocol):
    """How one modality enters and leaves a transformer. `name` is the prefix of its fields in diffusers."""

    name: str

    def pack(self, model: Cosmos3OmniTransformer, latents: list[Tensor], items: Items) -> Tensor:
        """The tokens [n, channels] of all items."""
        ...

    def project_in(self, model: Cosmos3OmniTransformer, tokens: Tensor, items: Items) -> Tensor:
        """Project tokens [n, channels] to the layers' input [n, hidden], before the noise level is added."""
        ...

    def project_out(self, model: Cosmos3OmniTransformer, hidden: Tensor, items: Items) -> Tensor:
        """The velocity [n, channels] of tokens [n, hidden] after the last norm."""
        ...

    def unpack(
        self, model: Cosmos3OmniTransformer, velocity: Tensor, items: Items, latents: Sequence[Tensor]
    ) -> list[Tensor]:
        """Unpack `velocity` [n, channels] of all noisy tokens into one tensor per latent; clean frames are 0."""
        ...

    def channels(self, model: Cosmos3OmniTransformer) -> int:
        """The number of values per token."""
        ...


class Vision:
    """Latents [1, C, T, h, w], one token per patch."""

    name = "vision"

    def pack(self, model: Cosmos3OmniTransformer, latents: list[Tensor], items: Items) -> Tensor:
        packed, _ = model._patchify_and_pack_latents(latents)
        assert isinstance(packed, Tensor)
        return packed

    def project_in(self, model: Cosmos3OmniTransformer, tokens: Tensor, items: Items) -> Tensor:
        entered: Tensor = model.proj_in(tokens)
        return entered

    def project_out(self, model: Cosmos3OmniTransformer, hidden: Tensor, items: Items) -> Tensor:
        left: Tensor = model.proj_out(hidden)
        return left

    def unpack(
        self, model: Cosmos3OmniTransformer, velocity: Tensor, items: Items, latents: Sequence[Tensor]
    ) -> list[Tensor]:
        velocities = model._unpatchify_and_unpack_latents(
            velocity,
            token_shapes_vision=items.shapes,
            noisy_frame_indexes_vision=items.noisy_frames,
            original_latent_shapes=[tuple(latent.shape[-3:]) for latent in latents],
        )
        assert isinstance(velocities, list)
        return velocities

    def channels(self, model: Cosmos3OmniTransformer) -> int:
        return int(model.proj_out.out_features)


class Sound:
    """Latents [C, T] of a waveform, one token per frame."""

    name = "sound"

    def pack(self, model: Cosmos3OmniTransformer, latents: list[Tensor], items: Items) -> Tensor:
        packed: Tensor = model._pack_sound_latents(latents, items.shapes)
        return packed

    def project_in(self, model: Cosmos3OmniTransformer, tokens: Tensor, items: Items) -> Tensor:
        entered: Tensor = model.audio_proj_in(tokens) + model.audio_modality_embed
        return entered

    def project_out(self, model: Cosmos3OmniTransformer, hidden: Tensor, items: Items) -> Tensor:
        left: Tensor = model.audio_proj_out(hidden)
        return left

    def unpack(
        self, model: Cosmos3OmniTransformer, velocity: Tensor, items: Items, latents: Sequence[Tensor]
    ) -> list[Tensor]:
        velocities = model._unpack_sound_latents(velocity, items.shapes, items.noisy_frames)
        assert isinstance(velocities, list)
        return velocities

    def channels(self, model: Cosmos3OmniTransformer) -> int:
        return int(model.config.sound_dim)


class Action:
    """Vectors [T, D], one token per vector, projected with the weights of one embodiment."""

    name = "action"

    def pack(self, model: Cosmos3OmniTransformer, latents: list[Tensor], items: Items) -> Tensor:
        return torch.cat([vectors[: shape[0]] for vectors, shape in zip(latents, items.shapes, strict=True)])

    def project_in(self, model: Cosmos3OmniTransformer, tokens: Tensor, items: Items) -> Tensor:
        entered: Tensor = _of_domain(model.action_proj_in, tokens, items) + model.action_modality_embed
        return entered

    def project_out(self, model: Cosmos3OmniTransformer, hidden: Tensor, items: Items) -> Tensor:
        return _of_domain(model.action_proj_out, hidden, items)

    def unpack(
        self, model: Cosmos3OmniTransformer, velocity: Tensor, items: Items, latents: Sequence[Tensor]
    ) -> list[Tensor]:
        velocities = model._unpack_action_latents(velocity, items.shapes, items.noisy_frames)
        assert isinstance(velocities, list)
        return velocities

    def channels(self, model: Cosmos3OmniTransformer) -> int:
        return int(model.config.action_dim)


def _of_domain(linear: Any, x: Tensor, items: Items) -> Tensor:
    """Project x [n, inputs] with the weights of the items' domain.

    diffusers' module is not called, because it looks up the domain of each token and waits for the device to check
    all of them.
    """
    weight = linear.fc.weight[items.domain].view(linear.input_size, linear.output_size)
    projected: Tensor = torch.bmm(x.unsqueeze(1), weight.expand(len(x), -1, -1)).squeeze(1)
    return projected.add_(linear.bias.weight[items.domain])


MODALITIES: tuple[Modality, ...] = (Vision(), Sound(), Action())  # in the order of the sequence


def items_of(fields: Mapping[str, Any]) -> tuple[Items, ...]:
    """The items of a sequence, from the `fields` that diffusers' packing steps make for the model's `forward`."""
    found = []
    for modality in MODALITIES:
        shapes = fields.get(f"{modality.name}_token_shapes")
        if shapes is None:
            continue
        domains = fields.get(f"{modality.name}_domain_ids")
        found.append(
            Items(
                modality,
                shapes=shapes,
                noisy_frames=fields[f"{modality.name}_noisy_frame_indexes"],
                noisy=fields[f"{modality.name}_mse_loss_indexes"],
                domain=None if domains is None else int(domains[0]),
            )
        )
    return tuple(found)
