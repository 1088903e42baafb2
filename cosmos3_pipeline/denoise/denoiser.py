"""The block that predicts velocities inside diffusers' Cosmos3 denoising loop, over the `cfg` and `ulysses` axes.

It takes the place of `Cosmos3LoopDenoiser` in the loops of all modalities; noise, schedule and solver stay
diffusers'. Source: diffusers `modular_pipelines/cosmos/denoise.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.modular_pipelines.cosmos.denoise import Cosmos3LoopDenoiser
from torch import Tensor

from cosmos3_pipeline.denoise.checks import check_layout
from cosmos3_pipeline.denoise.exchange import Exchange
from cosmos3_pipeline.denoise.guidance import COND, UNCOND, Guidance, PassCounts
from cosmos3_pipeline.denoise.layers import Layers, LoadedLayers
from cosmos3_pipeline.denoise.modalities import MODALITIES, items_of
from cosmos3_pipeline.denoise.texts import TextEncoder, Texts
from cosmos3_pipeline.denoise.transformer import ParallelTransformer, PreparedPass
from cosmos3_pipeline.distributed.mesh import RankMesh


@dataclass
class _Loop:
    """What does not change between the steps of one loop. `own` are this rank's passes by their numbers."""

    transformer: ParallelTransformer
    guidance: Guidance
    own: dict[int, PreparedPass]
    timesteps: list[float]


class ParallelLoopDenoiser(Cosmos3LoopDenoiser):  # type: ignore[misc] # diffusers is untyped
    """Predicts the guided velocity of one step; all ranks of a replica call it together and get the same.

    With two ranks on `cfg`, the first runs the conditional pass and the second the unconditional one; they
    swap velocities and each combines both, in diffusers' arithmetic and order. Without a mesh this rank does
    everything alone. `layers` is where the transformer's layers come from, `texts` has prompts that are encoded
    already; without them the transformer is whole, and the text is encoded before the first step.

    `guidance_interval` are the timesteps between which the unconditional pass is computed; None: in every step.
    Passes are counted in `counts`.
    """

    def __init__(
        self,
        mesh: RankMesh | None = None,
        *,
        layers: Layers | None = None,
        texts: Texts | None = None,
        guidance_interval: Sequence[float] | None = None,
        counts: PassCounts | None = None,
    ) -> None:
        super().__init__()
        self._layers = layers
        self._texts = texts
        self._interval = guidance_interval
        self._counts = PassCounts() if counts is None else counts
        self._guidance = Exchange(None if mesh is None else mesh.comm("cfg"))
        self._sequence = Exchange(None if mesh is None else mesh.comm("ulysses"))

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelLoopDenoiser:
        """The block itself: diffusers copies a workflow's blocks, and process groups cannot be copied."""
        return self

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        if not hasattr(block_state, "parallel_loop"):
            block_state.parallel_loop = self._begin(components.transformer, block_state)
        loop: _Loop = block_state.parallel_loop
        latents, passes = self._latents(block_state), loop.guidance.at(loop.timesteps[i])
        # Its value stays on the device: reading it on the host would wait for all that was launched before.
        timestep = t.reshape(1).to(latents["vision"][0].device)
        own = self._velocities(loop, passes, latents, timestep)
        velocity = loop.guidance.combine(self._exchanged(loop, passes, own))
        self._counts.computed.update(loop.guidance.passes[number].name for number in passes)
        transformer, any_pass = loop.transformer, next(iter(loop.own.values()))
        found = transformer.assemble(any_pass, transformer.gather(any_pass, velocity), latents)
        for modality in MODALITIES:
            velocity_of = found.get(modality.name)
            setattr(block_state, f"velocity_{modality.name}", None if velocity_of is None else velocity_of[-1])
        actions = block_state.velocity_action
        if actions is not None and (width := block_state.raw_action_dim_resolved) is not None:
            actions[:, width:] = 0  # of what no embodiment with so few numbers has
        return components, block_state

    def _velocities(
        self, loop: _Loop, passes: Sequence[int], latents: Mapping[str, list[Tensor]], timestep: Tensor
    ) -> list[Tensor]:
        """The velocity of own tokens, flat, of each of `passes` that is this rank's."""
        own = [loop.own[number] for number in passes if number in loop.own]
        embedded = [loop.transformer.embed(own[0], latents, timestep)] * len(own) if own else []
        prepared = iter(own)
        # Also without a pass of its own, because other ranks may gather the layers with this one.
        return [loop.transformer.velocity(next(prepared), one) for one in loop.transformer.hidden(own, embedded)]

    def _exchanged(self, loop: _Loop, passes: Sequence[int], own: list[Tensor]) -> dict[int, Tensor]:
        """The velocities of all `passes` by their numbers, from those of `own` passes of each rank on `cfg`."""
        if self._guidance.ranks == 1:
            return dict(zip(passes, own, strict=True))
        any_pass = next(iter(loop.own.values()))
        values = any_pass.predicted[self._sequence.rank]
        shares = loop.guidance.shares(self._guidance.ranks)
        sizes = [sum(number in share for number in passes) * values for share in shares]
        sent = own[0] if len(own) == 1 else torch.cat(own) if own else any_pass.text.layers[0].key.new_empty(0)
        every = self._guidance.gather_rows(sent, sizes)
        return dict(zip(passes, every.view(len(passes), values).unbind(), strict=True))

    def _latents(self, block_state: Any) -> dict[str, list[Tensor]]:
        """What is denoised and what it is conditioned on, by modality."""
        found = {one.name: getattr(block_state, f"{one.name}_tokens", None) for one in MODALITIES}
        return {name: latents for name, latents in found.items() if latents is not None}

    def guidance(self, block_state: Any) -> Guidance:
        """The passes of a loop."""
        return Guidance.of_prompt(block_state.guidance_scale, self._interval)

    def _begin(self, whole: Any, block_state: Any) -> _Loop:
        """Prepare this rank's passes; the timesteps are read here, once, because that waits for the device."""
        guidance, transformer = self.guidance(block_state), self._accelerate(whole, block_state)
        numbers = guidance.shares(self._guidance.ranks)[self._guidance.rank]
        texts = self._texts or Texts(block_state.vision_tokens[0].device)
        names = guidance.names(ranks=self._guidance.ranks, rank=self._guidance.rank)
        fields = [_fields(block_state.denoiser_input_fields, name) for name in names]
        prompts = [(one["input_ids"], one["text_mrope_ids"]) for one in fields]
        encoder = TextEncoder(whole, ulysses=self._sequence, layers=self._layers or LoadedLayers(whole))
        own = {
            number: transformer.prepare(text, position_ids=one["position_ids"], items=items_of(one))
            for number, one, text in zip(numbers, fields, texts.take(encoder, prompts), strict=True)
        }
        return _Loop(transformer, guidance, own, block_state.timesteps.cpu().tolist())

    def _accelerate(self, transformer: Any, block_state: Any) -> ParallelTransformer:
        check_layout(
            num_attention_heads=transformer.config.num_attention_heads,
            num_key_value_heads=transformer.config.num_key_value_heads,
            cfg=self._guidance.ranks,
            ulysses=self._sequence.ranks,
            guidance_scale=block_state.guidance_scale,
        )
        return ParallelTransformer(transformer, ulysses=self._sequence, layers=self._layers)


def _fields(inputs: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What diffusers' packing steps have left for the guidance pass `name`: its own, and those of all passes."""
    found = {field: value for field, value in inputs.items() if field.partition("_")[0] not in (COND, UNCOND)}
    for field, value in inputs.items():
        whose, _, own = field.partition("_")
        if whose == name:
            found |= value if own.endswith("_segment") else {own: value}
    return found
