"""The block that predicts velocities inside diffusers' Cosmos3 denoising loop, over the `cfg` and `ulysses` axes.

It takes the place of `Cosmos3LoopDenoiser` in the loops of all modalities; noise, schedule and solver stay
diffusers'. Source: diffusers `modular_pipelines/cosmos/denoise.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.modular_pipelines.cosmos.denoise import Cosmos3LoopDenoiser
from torch import Tensor

from cosmos3_pipeline.denoise.checks import check_layout
from cosmos3_pipeline.denoise.exchange import Exchange
from cosmos3_pipeline.denoise.layers import Layers, LoadedLayers
from cosmos3_pipeline.denoise.modalities import MODALITIES, items_of
from cosmos3_pipeline.denoise.texts import PASSES, TextEncoder, Texts, own_passes
from cosmos3_pipeline.denoise.transformer import ParallelTransformer, PreparedPass
from cosmos3_pipeline.distributed.mesh import RankMesh


class ParallelLoopDenoiser(Cosmos3LoopDenoiser):  # type: ignore[misc] # diffusers is untyped
    """Predicts the guided velocity of one step; all ranks of a replica call it together and get the same.

    With two ranks on `cfg`, the first runs the conditional pass and the second the unconditional one; they
    swap velocities and each combines both, in diffusers' arithmetic and order. Without a mesh this rank does
    everything alone. `layers` is where the transformer's layers come from, `texts` has prompts that are encoded
    already; without them the transformer is whole, and the text is encoded before the first step.
    """

    def __init__(
        self, mesh: RankMesh | None = None, *, layers: Layers | None = None, texts: Texts | None = None
    ) -> None:
        super().__init__()
        self._layers = layers
        self._texts = texts
        self._guidance = Exchange(None if mesh is None else mesh.comm("cfg"))
        self._sequence = Exchange(None if mesh is None else mesh.comm("ulysses"))

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelLoopDenoiser:
        """The block itself: diffusers copies a workflow's blocks, and process groups cannot be copied."""
        return self

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        if not hasattr(block_state, "parallel_passes"):
            block_state.parallel_transformer = self._accelerate(components.transformer, block_state)
            block_state.parallel_passes = self._prepare(components.transformer, block_state)
        transformer, passes = block_state.parallel_transformer, block_state.parallel_passes
        any_pass, latents = passes[0], self._latents(block_state)
        # Its value stays on the device: reading it on the host would wait for all that was launched before.
        timestep = t.reshape(1).to(latents["vision"][0].device)
        embedded = transformer.embed(any_pass, latents, timestep)
        velocities = transformer.predict(passes, [embedded] * len(passes))
        if self._guidance.ranks > 1:
            (own,) = velocities
            both = self._guidance.gather_rows(own, [len(own)] * self._guidance.ranks)
            velocities = list(both.view(self._guidance.ranks, len(own)).unbind())
        velocity = velocities[0].float()
        if len(velocities) > 1:
            uncond = velocities[1].float()
            # uncond + scale * (cond - uncond) on packed tokens: half of what unpacking both passes would move
            velocity = (velocity - uncond).mul_(block_state.guidance_scale).add_(uncond)
        found = transformer.assemble(any_pass, transformer.gather(any_pass, velocity), latents)
        for modality in MODALITIES:
            velocity_of = found.get(modality.name)
            setattr(block_state, f"velocity_{modality.name}", None if velocity_of is None else velocity_of[-1])
        actions = block_state.velocity_action
        if actions is not None and (width := block_state.raw_action_dim_resolved) is not None:
            actions[:, width:] = 0  # of what no embodiment with so few numbers has
        return components, block_state

    def _latents(self, block_state: Any) -> dict[str, list[Tensor]]:
        """What is denoised and what it is conditioned on, by modality."""
        found = {one.name: getattr(block_state, f"{one.name}_tokens", None) for one in MODALITIES}
        return {name: latents for name, latents in found.items() if latents is not None}

    def _accelerate(self, transformer: Any, block_state: Any) -> ParallelTransformer:
        check_layout(
            num_attention_heads=transformer.config.num_attention_heads,
            num_key_value_heads=transformer.config.num_key_value_heads,
            cfg=self._guidance.ranks,
            ulysses=self._sequence.ranks,
            guidance_scale=block_state.guidance_scale,
        )
        return ParallelTransformer(transformer, ulysses=self._sequence, layers=self._layers)

    def _prepare(self, whole: Any, block_state: Any) -> list[PreparedPass]:
        """This rank's guidance passes, in diffusers' order."""
        names = own_passes(block_state.guidance_scale, ranks=self._guidance.ranks, rank=self._guidance.rank)
        transformer = block_state.parallel_transformer
        texts = self._texts or Texts(block_state.vision_tokens[0].device)
        fields = [_fields(block_state.denoiser_input_fields, name) for name in names]
        prompts = [(one["input_ids"], one["text_mrope_ids"]) for one in fields]
        encoder = TextEncoder(whole, ulysses=self._sequence, layers=self._layers or LoadedLayers(whole))
        return [
            transformer.prepare(text, position_ids=one["position_ids"], items=items_of(one))
            for one, text in zip(fields, texts.take(encoder, prompts), strict=True)
        ]


def _fields(inputs: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What diffusers' packing steps have left for the guidance pass `name`: its own, and those of all passes."""
    found = {field: value for field, value in inputs.items() if field.partition("_")[0] not in PASSES}
    for field, value in inputs.items():
        whose, _, own = field.partition("_")
        if whose == name:
            found |= value if own.endswith("_segment") else {own: value}
    return found
