"""The block that predicts velocities in diffusers' Cosmos3 denoising loop, parallel over guidance and sequence.

The block replaces `Cosmos3LoopDenoiser` in the loops of all modalities. Noise, schedule and solver stay
diffusers'. Source: diffusers `modular_pipelines/cosmos/denoise.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SeaCacheConfig
from diffusers.modular_pipelines.cosmos.denoise import Cosmos3LoopDenoiser
from torch import Tensor

from cosmos3_pipeline.denoise.cache import StepCache
from cosmos3_pipeline.denoise.checks import check_layout
from cosmos3_pipeline.denoise.exchange import Exchange
from cosmos3_pipeline.denoise.guidance import COND, UNCOND, Guidance, PassCounts
from cosmos3_pipeline.denoise.layers import Layers, LoadedLayers
from cosmos3_pipeline.denoise.modalities import MODALITIES, items_of
from cosmos3_pipeline.denoise.texts import EncodedText, TextEncoder, Texts
from cosmos3_pipeline.denoise.transformer import ParallelTransformer, PreparedPass
from cosmos3_pipeline.distributed.mesh import REPLICA, RankMesh


@dataclass
class Loop:
    """Everything that stays the same in all steps of one loop. `own` maps numbers to this rank's passes."""

    transformer: ParallelTransformer
    guidance: Guidance
    own: dict[int, PreparedPass]
    timesteps: list[float]
    sigmas: list[float]
    cache: StepCache | None

    @property
    def any_pass(self) -> PreparedPass:
        """Any pass of this rank, for uses where the choice does not matter: all passes predict the same values."""
        return next(iter(self.own.values()))


@dataclass(frozen=True)
class Step:
    """One step: its index, the numbers of its passes, and the numbers of the passes that the cache skips."""

    place: int
    passes: tuple[int, ...]
    spared: frozenset[int]


class ParallelLoopDenoiser(Cosmos3LoopDenoiser):  # type: ignore[misc] # diffusers is untyped
    """Predicts the guided velocity of one step; all ranks of a replica call it together and get the same result.

    With two ranks on `cfg`, the first runs the conditional pass and the second the unconditional pass. They
    exchange velocities, and each rank combines both with diffusers' arithmetic in diffusers' order. Without a mesh
    this rank computes everything.

    `layers` is the source of the transformer's layers; without it the transformer must be loaded as a whole.
    `texts` has prompts that are encoded already; without it the text is encoded before the first step. With
    `keep_texts` one object serves all chunks of a clip: it takes the prompts from `texts` once and keeps them.

    The unconditional pass is computed at timesteps within `guidance_interval`; None means in every step.
    With `cache` passes are skipped as diffusers' SeaCache skips them. Passes are counted in `counts`.
    """

    def __init__(
        self,
        mesh: RankMesh | None = None,
        *,
        layers: Layers | None = None,
        texts: Texts | None = None,
        guidance_interval: Sequence[float] | None = None,
        cache: SeaCacheConfig | None = None,
        counts: PassCounts | None = None,
        keep_texts: bool = False,
    ) -> None:
        super().__init__()
        self._layers = layers
        self._texts = texts
        self._interval = guidance_interval
        self._cache = cache
        # All ranks that share layers or tokens: these ranks must skip the same passes.
        self._replica = None if mesh is None or cache is None else mesh.comm(REPLICA)
        self._counts = PassCounts() if counts is None else counts
        self._guidance = Exchange(None if mesh is None else mesh.comm("cfg"))
        self._sequence = Exchange.over_sequence(mesh)
        self._keep_texts = keep_texts
        self._taken: dict[str, EncodedText] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelLoopDenoiser:
        """Return this object: diffusers copies a workflow's blocks, but process groups cannot be copied."""
        return self

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        if not hasattr(block_state, "parallel_loop"):
            block_state.parallel_loop = self._begin(components, block_state)
        loop: Loop = block_state.parallel_loop
        latents = self._latents(block_state)
        step = self._step(loop, lambda: _noisy(loop, latents), i)
        # The timestep stays on the device: if the host read it, the host would wait for all kernels in flight.
        timestep = t.reshape(1).to(latents["vision"][0].device)
        own = self._velocities(loop, step, latents, timestep)
        velocity = loop.guidance.combine(self._exchanged(loop, step, own))
        gathered = loop.transformer.gather(loop.any_pass, velocity)
        found = loop.transformer.assemble(loop.any_pass, gathered, latents)
        for modality in MODALITIES:
            velocity_of = found.get(modality.name)
            setattr(block_state, f"velocity_{modality.name}", None if velocity_of is None else velocity_of[-1])
        return components, block_state

    def _step(self, loop: Loop, noisy: Callable[[], list[Tensor]], place: int) -> Step:
        """The step with index `place`; counts its passes. `noisy` returns the vision latents that have noise."""
        passes, spared = loop.guidance.at(loop.timesteps[place]), frozenset[int]()
        if loop.cache is not None:
            spared = loop.cache.spared(
                passes,
                noisy(),
                step=place,
                steps=len(loop.timesteps),
                sigma=loop.sigmas[place],
            )
        for number in passes:
            counted = self._counts.cached if number in spared else self._counts.computed
            counted[loop.guidance.passes[number].name] += 1
        return Step(place, passes, spared)

    def _velocities(
        self, loop: Loop, step: Step, latents: Mapping[str, list[Tensor]], timestep: Tensor
    ) -> dict[int, Tensor]:
        """This rank's passes of a step, in order: the flat velocity of this rank's tokens in each."""
        own = [number for number in step.passes if number in loop.own]
        embedded = dict.fromkeys(own, loop.transformer.embed(loop.any_pass, latents, timestep)) if own else {}
        return self._computed(loop, step, embedded)

    def _computed(self, loop: Loop, step: Step, embedded: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The flat velocity of this rank's tokens, by pass number; `embedded` has these passes' tokens."""
        transformer, found = loop.transformer, dict[int, Tensor]()
        computed = [number for number in embedded if number not in step.spared]
        if len(step.spared) < len(step.passes):
            # This rank takes part even if it has no pass here, because other ranks may gather the layers with it.
            passes = [loop.own[number] for number in computed], [embedded[number] for number in computed]
            for hidden, number in zip(transformer.hidden(*passes), computed, strict=True):
                if loop.cache is not None:
                    loop.cache.keep(number, step.place, embedded[number], hidden)
                found[number] = transformer.velocity(loop.own[number], hidden)
        for number in step.spared.intersection(embedded):
            assert loop.cache is not None
            hidden = loop.cache.recall(number, step.place, embedded[number])
            found[number] = transformer.velocity(loop.own[number], hidden)
        return {number: found[number] for number in embedded}

    def _exchanged(self, loop: Loop, step: Step, own: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        """Gather the velocities of all passes of a step, by number; `own` has those of this rank's passes."""
        if self._guidance.ranks == 1:
            return own
        values = loop.any_pass.predicted[self._sequence.rank]
        shares = loop.guidance.shares(self._guidance.ranks)
        sizes = [sum(number in share for number in step.passes) * values for share in shares]
        nothing = loop.any_pass.text.layers[0].key.new_empty(0)
        sent = next(iter(own.values())) if len(own) == 1 else torch.cat([*own.values(), nothing])
        every = self._guidance.gather_rows(sent, sizes)
        return dict(zip(step.passes, every.view(len(step.passes), values).unbind(), strict=True))

    def _latents(self, block_state: Any) -> dict[str, list[Tensor]]:
        """The latents by modality: noisy ones, and the clean ones that condition them."""
        found = {one.name: getattr(block_state, f"{one.name}_tokens", None) for one in MODALITIES}
        return {name: latents for name, latents in found.items() if latents is not None}

    def guidance(self, block_state: Any) -> Guidance:
        """The passes of a loop."""
        return Guidance.of_prompt(block_state.guidance_scale, self._interval)

    def _begin(self, components: Any, block_state: Any) -> Loop:
        """Prepare this rank's passes. The schedule is read only here, because the read waits for the device."""
        whole, scheduler = components.transformer, components.scheduler
        guidance, transformer = self.guidance(block_state), self._accelerate(whole, block_state)
        numbers = guidance.shares(self._guidance.ranks)[self._guidance.rank]
        fields = {
            number: _fields(block_state.denoiser_input_fields, guidance.passes[number].name) for number in numbers
        }
        own = self._prepared(whole, transformer, guidance, fields)
        return self._loop(transformer, guidance, own, block_state.timesteps, scheduler.sigmas)

    def _loop(
        self,
        transformer: ParallelTransformer,
        guidance: Guidance,
        own: dict[int, PreparedPass],
        *schedule: Tensor,
    ) -> Loop:
        """The loop over a `schedule` of timesteps and sigmas."""
        cache = None if self._cache is None else StepCache(self._cache, self._replica)
        timesteps, sigmas = (found.cpu().tolist() for found in schedule)
        return Loop(transformer, guidance, own, timesteps, sigmas, cache)

    def _prepared(
        self, whole: Any, transformer: ParallelTransformer, guidance: Guidance, fields: Mapping[int, Any]
    ) -> dict[int, PreparedPass]:
        """This rank's passes by number, from diffusers' `fields` of each. Two with one prompt share its text."""
        prompts = {
            guidance.passes[number].prompt: (one["input_ids"], one["text_mrope_ids"])
            for number, one in fields.items()
        }
        taken = self._taken
        if not taken:
            texts = self._texts or Texts(next(iter(prompts.values()))[0].device)
            encoder = TextEncoder(whole, sequence=self._sequence, layers=self._layers or LoadedLayers(whole))
            taken = dict(zip(prompts, texts.take(encoder, list(prompts.values())), strict=True))
            self._taken = taken if self._keep_texts else {}
        return {
            number: transformer.prepare(
                taken[guidance.passes[number].prompt], position_ids=one["position_ids"], items=items_of(one)
            )
            for number, one in fields.items()
        }

    def _accelerate(self, transformer: Any, block_state: Any) -> ParallelTransformer:
        check_layout(
            num_attention_heads=transformer.config.num_attention_heads,
            num_key_value_heads=transformer.config.num_key_value_heads,
            cfg=self._guidance.ranks,
            ulysses=self._sequence.grid.ulysses,
            guidance_scale=block_state.guidance_scale,
        )
        return ParallelTransformer(transformer, sequence=self._sequence, layers=self._layers)


def _noisy(loop: Loop, latents: Mapping[str, list[Tensor]]) -> list[Tensor]:
    """The vision latents in which at least one frame has noise."""
    vision = next(share.items for share in loop.any_pass.shares if share.items.modality.name == "vision")
    clips = zip(latents["vision"], vision.noisy_frames, strict=True)
    return [clip for clip, noisy in clips if len(noisy)]


def _fields(inputs: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The outputs of diffusers' packing steps for the guidance pass `name`, including those for all passes."""
    found = {field: value for field, value in inputs.items() if field.partition("_")[0] not in (COND, UNCOND)}
    for field, value in inputs.items():
        whose, _, own = field.partition("_")
        if whose == name:
            found |= value if own.endswith("_segment") else {own: value}
    return found
