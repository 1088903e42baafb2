"""The block that predicts velocities inside diffusers' Cosmos3 denoising loop, over the `cfg` and `ulysses` axes.

It takes the place of `Cosmos3LoopDenoiser` in `Cosmos3VisionDenoiseStep`; noise, schedule and solver stay
diffusers'. Source: diffusers `modular_pipelines/cosmos/denoise.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines.cosmos.denoise import Cosmos3LoopDenoiser
from torch import Tensor

from cosmos3_pipeline.denoise.checks import check_layout
from cosmos3_pipeline.denoise.exchange import Exchange
from cosmos3_pipeline.denoise.layers import Layers, LoadedLayers
from cosmos3_pipeline.denoise.texts import TextEncoder, Texts, own_passes
from cosmos3_pipeline.denoise.transformer import ParallelTransformer, PreparedPass
from cosmos3_pipeline.distributed.mesh import RankMesh
from cosmos3_pipeline.errors import Refusal


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
        any_pass = passes[0]
        # Its value stays on the device: reading it on the host would wait for all that was launched before.
        timestep = t.reshape(1).to(block_state.vision_tokens[0].device)
        embedded, latent_shapes = transformer.embed(any_pass, block_state.vision_tokens, timestep)
        velocities = transformer.predict(passes, embedded)
        if self._guidance.ranks > 1:
            (own,) = velocities
            both = self._guidance.gather_rows(own, [len(own)] * self._guidance.ranks)
            velocities = list(both.view(self._guidance.ranks, *own.shape).unbind())
        velocity = velocities[0].float()
        if len(velocities) > 1:
            uncond = velocities[1].float()
            # uncond + scale * (cond - uncond) on packed tokens: half of what unpacking both passes would move
            velocity = (velocity - uncond).mul_(block_state.guidance_scale).add_(uncond)
        block_state.velocity_vision = transformer.assemble(any_pass, velocity, latent_shapes)[0]
        block_state.velocity_sound = None
        block_state.velocity_action = None
        return components, block_state

    def _accelerate(self, transformer: Any, block_state: Any) -> ParallelTransformer:
        check_layout(
            num_attention_heads=transformer.config.num_attention_heads,
            num_key_value_heads=transformer.config.num_key_value_heads,
            cfg=self._guidance.ranks,
            ulysses=self._sequence.ranks,
            guidance_scale=block_state.guidance_scale,
        )
        for modality in ("sound", "action"):
            if getattr(block_state, f"{modality}_tokens", None) is not None:
                raise Refusal(
                    what=f"{modality} tokens in a parallel denoising run",
                    why="the parallel transformer splits and caches text and vision only",
                    works=f"a task without {modality}, or diffusers' own Cosmos3LoopDenoiser on one rank",
                )
        return ParallelTransformer(transformer, ulysses=self._sequence, layers=self._layers)

    def _prepare(self, whole: Any, block_state: Any) -> list[PreparedPass]:
        """This rank's guidance passes, in diffusers' order."""
        names = own_passes(block_state.guidance_scale, ranks=self._guidance.ranks, rank=self._guidance.rank)
        transformer, fields = block_state.parallel_transformer, block_state.denoiser_input_fields
        texts = self._texts or Texts(block_state.vision_tokens[0].device)
        segments = [fields[f"{name}_text_segment"] for name in names]
        prompts = [(segment["input_ids"], segment["text_mrope_ids"]) for segment in segments]
        encoder = TextEncoder(whole, ulysses=self._sequence, layers=self._layers or LoadedLayers(whole))
        passes = []
        for name, text in zip(names, texts.take(encoder, prompts), strict=True):
            vision = fields[f"{name}_vision_segment"]
            prepared = transformer.prepare(
                text,
                position_ids=fields[f"{name}_position_ids"],
                vision_token_shapes=vision["vision_token_shapes"],
                vision_mse_loss_indexes=vision["vision_mse_loss_indexes"],
                vision_noisy_frame_indexes=vision["vision_noisy_frame_indexes"],
            )
            passes.append(prepared)
        return passes
