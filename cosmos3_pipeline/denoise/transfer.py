"""The block that predicts the velocity of a clip that follows control clips, with up to three guidance passes.

Passes with controls run over [controls, clip], the pass without controls over the clip only. A rank therefore
holds different rows of the clip in different passes, and each pass's velocity is gathered before passes are
combined. Source: diffusers `Cosmos3TransferLoopDenoiser` in `modular_pipelines/cosmos/denoise.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.modular_pipelines.cosmos.denoise import Cosmos3TransferLoopDenoiser
from torch import Tensor

from cosmos3_pipeline.denoise.denoiser import Loop, ParallelLoopDenoiser, Step
from cosmos3_pipeline.denoise.guidance import Guidance
from cosmos3_pipeline.denoise.transformer import ParallelTransformer


class ParallelTransferDenoiser(ParallelLoopDenoiser):
    """As `ParallelLoopDenoiser`, in the loop of `Cosmos3TransferDenoiseStep`.

    The pass without controls is computed at timesteps within `control_interval`; None means in every step.
    """

    def __init__(self, *args: Any, control_interval: Sequence[float] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._control_interval = control_interval

    @property
    def inputs(self) -> Any:
        return Cosmos3TransferLoopDenoiser().inputs

    @property
    def intermediate_outputs(self) -> Any:
        return Cosmos3TransferLoopDenoiser().intermediate_outputs

    def guidance(self, block_state: Any) -> Guidance:
        """The passes of a loop."""
        scales = block_state.guidance_scale, block_state.control_guidance
        return Guidance.of_controls(*scales, self._interval, self._control_interval)

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        if not hasattr(block_state, "parallel_loop"):
            block_state.parallel_loop = self._begin(components, block_state)
        loop: Loop = block_state.parallel_loop
        tokens = {True: block_state.vision_tokens_full, False: block_state.vision_tokens_target}
        step = self._step(loop, lambda: tokens[False], i)
        timestep = t.reshape(1).to(tokens[False][0].device)
        own = self._own(loop, step, tokens, timestep)
        velocity = loop.guidance.combine(self._of_all(loop, step.passes, own))
        number, prepared = next(iter(loop.own.items()))
        latents = {"vision": tokens[loop.guidance.passes[number].controls]}
        block_state.velocity = loop.transformer.assemble(prepared, velocity, latents)["vision"][-1]
        return components, block_state

    def _own(
        self, loop: Loop, step: Step, tokens: Mapping[bool, list[Tensor]], timestep: Tensor
    ) -> dict[int, Tensor]:
        """This rank's passes of a step, by number: the flat velocity of all tokens."""
        transformer = loop.transformer
        own = [number for number in step.passes if number in loop.own]
        embedded: dict[bool, Tensor] = {}
        for number in own:
            controls = loop.guidance.passes[number].controls
            if controls not in embedded:
                embedded[controls] = transformer.embed(loop.own[number], {"vision": tokens[controls]}, timestep)
        found = self._computed(loop, step, {n: embedded[loop.guidance.passes[n].controls] for n in own})
        return {number: transformer.gather(loop.own[number], velocity) for number, velocity in found.items()}

    def _of_all(self, loop: Loop, passes: tuple[int, ...], own: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        """Gather the flat velocity of every pass of a step, by number; `own` has those of this rank's passes."""
        if self._guidance.ranks == 1:
            return own
        values = sum(loop.any_pass.predicted)
        shares = loop.guidance.shares(self._guidance.ranks)
        sizes = [sum(number in share for number in passes) * values for share in shares]
        nothing = loop.any_pass.text.layers[0].key.new_empty(0)
        every = self._guidance.gather_rows(torch.cat([*own.values(), nothing]), sizes)
        return dict(zip(passes, every.view(len(passes), values).unbind(), strict=True))

    def _begin(self, components: Any, block_state: Any) -> Loop:
        """Prepare this rank's passes over the current chunk."""
        whole, guidance = components.transformer, self.guidance(block_state)
        transformer = ParallelTransformer(whole, sequence=self._sequence, layers=self._layers)
        numbers = guidance.shares(self._guidance.ranks)[self._guidance.rank]
        fields = {
            number: block_state.denoiser_input_fields[f"{guidance.passes[number].name}_static"]
            for number in numbers
        }
        own = self._prepared(whole, transformer, guidance, fields)
        return self._loop(transformer, guidance, own, block_state.timesteps, components.scheduler.sigmas)
