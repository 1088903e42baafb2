"""The block that predicts the velocity where control clips are followed: up to three passes over two sequences.

The passes with controls go over [controls, clip], the one without over the clip alone, so a rank's own rows of the
clip are others in each. The velocity of a pass is therefore gathered before passes are combined. Source: diffusers
`Cosmos3TransferLoopDenoiser` in `modular_pipelines/cosmos/denoise.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.modular_pipelines.cosmos.denoise import Cosmos3TransferLoopDenoiser
from torch import Tensor

from cosmos3_pipeline.denoise.denoiser import Loop, ParallelLoopDenoiser
from cosmos3_pipeline.denoise.guidance import Guidance
from cosmos3_pipeline.denoise.layers import LoadedLayers
from cosmos3_pipeline.denoise.modalities import items_of
from cosmos3_pipeline.denoise.texts import EncodedText, TextEncoder, Texts
from cosmos3_pipeline.denoise.transformer import ParallelTransformer


class ParallelTransferDenoiser(ParallelLoopDenoiser):
    """As `ParallelLoopDenoiser`, in the loop of `Cosmos3TransferDenoiseStep`.

    One serves all chunks of a clip. It takes the prompts out of `texts` once and keeps them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._taken: dict[str, EncodedText] = {}

    @property
    def inputs(self) -> Any:
        return Cosmos3TransferLoopDenoiser().inputs

    @property
    def intermediate_outputs(self) -> Any:
        return Cosmos3TransferLoopDenoiser().intermediate_outputs

    def guidance(self, block_state: Any) -> Guidance:
        """The passes of a loop."""
        return Guidance.of_controls(block_state.guidance_scale, block_state.control_guidance, self._interval)

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        if not hasattr(block_state, "parallel_loop"):
            block_state.parallel_loop = self._begin(components, block_state)
        loop: Loop = block_state.parallel_loop
        passes = loop.guidance.at(loop.timesteps[i])
        for number in passes:
            self._counts.computed[loop.guidance.passes[number].name] += 1
        tokens = {True: block_state.vision_tokens_full, False: block_state.vision_tokens_target}
        timestep = t.reshape(1).to(tokens[False][0].device)
        own = self._own(loop, passes, tokens, timestep)
        velocity = loop.guidance.combine(self._of_all(loop, passes, own))
        number, prepared = next(iter(loop.own.items()))
        latents = {"vision": tokens[loop.guidance.passes[number].controls]}
        block_state.velocity = loop.transformer.assemble(prepared, velocity, latents)["vision"][-1]
        return components, block_state

    def _own(
        self, loop: Loop, passes: tuple[int, ...], tokens: Mapping[bool, list[Tensor]], timestep: Tensor
    ) -> dict[int, Tensor]:
        """The velocity of all tokens, flat, of each pass of a step that is this rank's."""
        transformer = loop.transformer
        own = [number for number in passes if number in loop.own]
        embedded: dict[bool, Tensor] = {}
        for number in own:
            controls = loop.guidance.passes[number].controls
            if controls not in embedded:
                embedded[controls] = transformer.embed(loop.own[number], {"vision": tokens[controls]}, timestep)
        # Also without a pass of its own, because other ranks may gather the layers with this one.
        found = transformer.hidden(
            [loop.own[number] for number in own],
            [embedded[loop.guidance.passes[number].controls] for number in own],
        )
        velocities = [
            transformer.velocity(loop.own[number], hidden) for number, hidden in zip(own, found, strict=True)
        ]
        return {
            number: transformer.gather(loop.own[number], velocity)
            for number, velocity in zip(own, velocities, strict=True)
        }

    def _of_all(self, loop: Loop, passes: tuple[int, ...], own: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        """The velocity of every pass of a step, flat, from that of own ones."""
        if self._guidance.ranks == 1:
            return own
        values = sum(loop.any_pass.predicted)
        shares = loop.guidance.shares(self._guidance.ranks)
        sizes = [sum(number in share for number in passes) * values for share in shares]
        nothing = loop.any_pass.text.layers[0].key.new_empty(0)
        every = self._guidance.gather_rows(torch.cat([*own.values(), nothing]), sizes)
        return dict(zip(passes, every.view(len(passes), values).unbind(), strict=True))

    def _begin(self, components: Any, block_state: Any) -> Loop:
        """Prepare this rank's passes over the present chunk."""
        whole, guidance = components.transformer, self.guidance(block_state)
        transformer = ParallelTransformer(whole, sequence=self._sequence, layers=self._layers)
        numbers = guidance.shares(self._guidance.ranks)[self._guidance.rank]
        fields = {
            number: block_state.denoiser_input_fields[f"{guidance.passes[number].name}_static"]
            for number in numbers
        }
        self._take_texts(whole, {guidance.passes[number].prompt: one for number, one in fields.items()})
        own = {
            number: transformer.prepare(
                self._taken[guidance.passes[number].prompt], position_ids=one["position_ids"], items=items_of(one)
            )
            for number, one in fields.items()
        }
        timesteps, sigmas = (
            found.cpu().tolist() for found in (block_state.timesteps, components.scheduler.sigmas)
        )
        return Loop(transformer, guidance, own, timesteps, sigmas, None)

    def _take_texts(self, whole: Any, fields: Mapping[str, Any]) -> None:
        """The prompts of `fields`, by their names, out of the texts; two passes with the prompt share one."""
        if self._taken:
            return
        prompts = {name: (one["input_ids"], one["text_mrope_ids"]) for name, one in fields.items()}
        texts = self._texts or Texts(next(iter(prompts.values()))[0].device)
        encoder = TextEncoder(whole, sequence=self._sequence, layers=self._layers or LoadedLayers(whole))
        self._taken = dict(zip(prompts, texts.take(encoder, list(prompts.values())), strict=True))
