"""The denoising stage of a plan: the cost of each rank, its memory and its time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cosmos3_pipeline.config.schema import Config, Device
from cosmos3_pipeline.denoise.cost import DenoiseCost, denoise_costs
from cosmos3_pipeline.denoise.shards import HeadShare, even_rows, head_shares
from cosmos3_pipeline.planning.geometry import clip_of
from cosmos3_pipeline.planning.hardware import accelerator_of
from cosmos3_pipeline.planning.stage import RankStage
from cosmos3_pipeline.planning.transformer import FP32_BYTES, TransformerSize

# Tensors of the latents' size, in fp32, that are alive while the model predicts (noise, latents, what the sampler
# remembers of earlier steps) and within a step of diffusers' UniPC sampler. Counted on running ones.
LATENTS_IN_MODEL = 8
LATENTS_IN_SAMPLER = 15
# A CPU computes an MLP in parts of about this many bytes, see `denoise.pathway`.
MLP_PART_BYTES = 2**20


@dataclass(frozen=True)
class Denoising:
    """Denoising over `cfg` x `ulysses` ranks; `costs` is in the order of the ranks, `ulysses` varying fastest.

    `latent_elements` are those of the clip's latents, `text_tokens` the length of each guidance pass,
    `vision_rows` the vision tokens of each ulysses rank.
    """

    size: TransformerSize
    latent_elements: int
    text_tokens: tuple[int, ...]
    vision_rows: tuple[int, ...]
    costs: tuple[DenoiseCost, ...]
    cfg: int
    element_bytes: int

    @classmethod
    def of(
        cls, cfg: Config, size: TransformerSize, *, text_tokens: tuple[int, int], element_bytes: int
    ) -> Denoising:
        """Of a config, whose layout must pass `denoise.checks.check_layout`."""
        clip, guidance = clip_of(cfg), cfg.sampler.guidance_scale
        costs = denoise_costs(
            size,
            text_tokens=text_tokens,
            latent_frames=clip.latent_frames,
            tokens_per_frame=clip.tokens_per_frame,
            clean_frames=cfg.task.condition_latent_frames,
            cfg=cfg.topology.cfg,
            ulysses=cfg.topology.ulysses,
            guidance_scale=guidance,
            element_bytes=element_bytes,
        )
        return cls(
            size=size,
            latent_elements=clip.latent_frames * clip.latent_rows * clip.latent_cols * cfg.model.vae.z_dim,
            text_tokens=text_tokens if guidance != 1.0 else text_tokens[:1],
            vision_rows=even_rows(clip.vision_tokens, cfg.topology.ulysses),
            costs=costs,
            cfg=cfg.topology.cfg,
            element_bytes=element_bytes,
        )

    def stage(self, cfg: Config, place: int, held: int) -> RankStage:
        """The stage on the rank at `place` of the costs, which holds `held` bytes of weights and text besides."""
        cost, steps, topology = self.costs[place], cfg.sampler.steps, cfg.topology
        accelerator = accelerator_of(cfg)
        passes = len(self.text_tokens) // self.cfg
        flops = cost.text_flops + steps * cost.step_flops
        rate = accelerator.flops_per_s[cfg.model.dtype] * accelerator.efficiency["transformer"]
        # Each pass of each step reads the vision pathway's weights once.
        reads = (
            steps * passes * self.size.num_hidden_layers * self.size.pathway_matrix_elements * self.element_bytes
        )
        sequence, guidance = cost.text_ulysses + cost.step_ulysses * steps, cost.step_cfg * steps
        link = accelerator.wire_seconds(
            sequence.bytes, sequence.messages, crosses_nodes=topology.ulysses > topology.ranks_per_node
        ) + accelerator.wire_seconds(
            guidance.bytes,
            guidance.messages,
            crosses_nodes=topology.cfg * topology.ulysses > topology.ranks_per_node,
        )
        activation = self.activation_bytes(place, on_cpu=topology.device == Device.cpu)
        return RankStage(
            flops=flops,
            activation_bytes=activation,
            peak_bytes=held + activation,
            sent=sequence + guidance,
            seconds={"compute": flops / rate, "memory": reads / accelerator.memory_bytes_per_s, "link": link},
            share={"vision_tokens": self.vision_rows[cost.ulysses_rank], "passes": passes},
        )

    def activation_bytes(self, place: int, *, on_cpu: bool) -> int:
        """The most that denoising holds beyond weights and text on the rank at `place` of the costs.

        Counts what `ParallelTransformer.predict` has alive at once: in attention, or in the MLP, whose
        intermediates a CPU computes in parts. Half precision takes the norm apart into fp32 passes.
        """
        size, rank = self.size, self.costs[place].ulysses_rank
        share = head_shares(size.num_attention_heads, size.num_key_value_heads, len(self.vision_rows))[rank]
        latents = self.latent_elements * FP32_BYTES
        text = max(self.text_tokens)
        rows = even_rows(text, len(self.vision_rows))
        prompt = self._layer_bytes(rows, rank, share, before=0, on_cpu=on_cpu)
        vision = self._layer_bytes(self.vision_rows, rank, share, before=text, on_cpu=on_cpu)
        return max(prompt, vision + LATENTS_IN_MODEL * latents, LATENTS_IN_SAMPLER * latents)

    def _layer_bytes(self, rows: Sequence[int], rank: int, share: HeadShare, *, before: int, on_cpu: bool) -> int:
        """The most that a layer holds for `rows` tokens per rank that also attend to `before` tokens of text."""
        size, n, everyone = self.size, rows[rank], sum(rows)
        queries, keys = share.num_queries * size.head_dim, share.num_keys * size.head_dim
        passes = len(self.text_tokens) // self.cfg if before else 1  # the longest prompt runs before the other
        # The embedded tokens that every pass begins with, the residual, and the projections of the layer.
        held = n * (2 * size.hidden_size + size.projection_width)
        held += passes * 2 * (max(self.text_tokens) + sum(self.vision_rows)) * size.head_dim  # rotary angles
        attended = everyone * queries
        if len(rows) > 1:
            held += everyone * (queries + 2 * keys)  # the projections as exchanged
        attention = held + everyone * (2 * queries + keys) + 2 * (before + everyone) * keys + attended
        part = n
        if on_cpu:
            part = n // max(min(n * size.intermediate_size * self.element_bytes // MLP_PART_BYTES, n // 128), 1)
        mlp = held + attended + 2 * n * size.hidden_size + part * (3 if size.gated else 2) * size.intermediate_size
        if len(rows) > 1:
            mlp += n * size.num_attention_heads * size.head_dim
        norm = 0 if self.element_bytes == FP32_BYTES else 2 * n * size.hidden_size * FP32_BYTES
        return max(max(attention, mlp) * self.element_bytes, (held + attended) * self.element_bytes + norm)
