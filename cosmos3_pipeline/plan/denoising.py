"""The denoising stage of a plan: the cost of each rank, its memory and its time."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig

from cosmos3_pipeline.denoise.cost import DenoiseCost, denoise_costs
from cosmos3_pipeline.denoise.shards import even_rows, head_shares
from cosmos3_pipeline.plan.geometry import clip_of
from cosmos3_pipeline.plan.hardware import accelerator_of
from cosmos3_pipeline.plan.stage import RankStage
from cosmos3_pipeline.plan.transformer import TransformerSize


@dataclass(frozen=True)
class Denoising:
    """Denoising over `cfg` x `ulysses` ranks; `costs` is in the order of the ranks, `ulysses` varying fastest.

    `text_tokens` holds the length of each guidance pass, `vision_rows` the vision tokens of each ulysses rank.
    """

    size: TransformerSize
    text_tokens: tuple[int, ...]
    vision_rows: tuple[int, ...]
    costs: tuple[DenoiseCost, ...]
    element_bytes: int

    @classmethod
    def of(
        cls, cfg: DictConfig, size: TransformerSize, *, text_tokens: tuple[int, int], element_bytes: int
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
            text_tokens=text_tokens if guidance != 1.0 else text_tokens[:1],
            vision_rows=even_rows(clip.vision_tokens, cfg.topology.ulysses),
            costs=costs,
            element_bytes=element_bytes,
        )

    def stage(self, cfg: DictConfig, place: int, held: int) -> RankStage:
        """The stage on the rank at `place` of the costs, which holds `held` bytes of weights and text besides."""
        cost, steps, topology = self.costs[place], cfg.sampler.steps, cfg.topology
        accelerator = accelerator_of(cfg)
        passes = len(self.text_tokens) // topology.cfg
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
        activation = self.activation_bytes(cost.ulysses_rank)
        return RankStage(
            flops=flops,
            activation_bytes=activation,
            peak_bytes=held + activation,
            sent=sequence + guidance,
            seconds={"compute": flops / rate, "memory": reads / accelerator.memory_bytes_per_s, "link": link},
            share={"vision_tokens": self.vision_rows[cost.ulysses_rank], "passes": passes},
        )

    def activation_bytes(self, rank: int) -> int:
        """The most that one layer holds beyond the weights and the text, on the ulysses rank `rank`.

        In attention: the residual, queries, keys and values as projected and as exchanged, and their result; in
        the MLP: the residual, its norm, and the intermediates (gate, up and their product).
        """
        size, rows, all_rows = self.size, self.vision_rows[rank], sum(self.vision_rows)
        share = head_shares(size.num_attention_heads, size.num_key_value_heads, len(self.vision_rows))[rank]
        attention = rows * (size.hidden_size + size.projection_width)
        attention += 2 * all_rows * share.sent_heads * size.head_dim
        mlp = rows * (2 * size.hidden_size + (3 if size.gated else 2) * size.intermediate_size)
        return max(attention, mlp) * self.element_bytes
