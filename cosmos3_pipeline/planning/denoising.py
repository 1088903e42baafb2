"""The transformer's stages in a plan, text and denoise: the cost, memory and time of each rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cosmos3_pipeline.config.schema import Config, Device, TaskName
from cosmos3_pipeline.denoise.cost import DenoiseCost, TextCost, Wire, denoise_costs
from cosmos3_pipeline.denoise.guidance import Guidance
from cosmos3_pipeline.denoise.shards import Grid, even_rows, head_shares, mlp_parts
from cosmos3_pipeline.planning.geometry import clip_of, grid_of, replica_ranks
from cosmos3_pipeline.planning.hardware import Accelerator, accelerator_of
from cosmos3_pipeline.planning.sampling import caches, guidance_of, passes_of, passes_of_steps
from cosmos3_pipeline.planning.stage import RankStage
from cosmos3_pipeline.planning.text import prompts_of
from cosmos3_pipeline.planning.transformer import FP32_BYTES, TransformerSize
from cosmos3_pipeline.planning.weights import WeightsCost

# fp32 tensors of the latents' size that are alive while the model predicts (noise, latents, the sampler's history)
# and within a step of diffusers' UniPC sampler. Counted in a run.
LATENTS_IN_MODEL = 8
LATENTS_IN_SAMPLER = 15
# The same for a distilled checkpoint, whose fixed steps keep no history.
DISTILLED_LATENTS_IN_MODEL = 5
DISTILLED_LATENTS_IN_SAMPLER = 10
# With a cache, rank 0 has more of these tensors: some while it filters the latents, and one that it compares with
# the next step. Counted in a rehearsal.
LATENTS_IN_FILTER = 7
LATENTS_COMPARED = 1


@dataclass(frozen=True)
class Denoising:
    """The denoise stage over the cfg axis and the `grid`. `costs` has one entry per rank, grid ranks fastest.

    latent_elements: elements of the clip's latents. Each control clip has the same number.
    controls: the number of control clips.
    text_tokens: the length of each prompt.
    rows: tokens of each rank of the grid, without text.
    prompts: how many clips a replica makes. Their prompts are encoded together.
    steps: for each set of guidance passes, by number, how many steps have it.
    residuals: how many steps a cache remembers for each pass; 0 without a cache.
    distilled: whether the steps are fixed. Fixed steps draw new noise.
    later: the stage of each chunk after the first, if the clip has several `chunks`.
    """

    size: TransformerSize
    modalities: frozenset[str]
    latent_elements: int
    controls: int
    text_tokens: tuple[int, ...]
    grid: Grid
    rows: tuple[int, ...]
    costs: tuple[DenoiseCost, ...]
    element_bytes: int
    prompts: int
    guidance: Guidance
    steps: Mapping[tuple[int, ...], int]
    residuals: int
    distilled: bool
    later: Denoising | None = None
    chunks: int = 1

    @classmethod
    def of(
        cls,
        cfg: Config,
        size: TransformerSize,
        *,
        text_tokens: tuple[int, int],
        element_bytes: int,
        chunk: int = 0,
    ) -> Denoising:
        """The denoise stage of chunk `chunk`. The layout of `cfg` must pass `denoise.checks.check_layout`."""
        clip, guidance, passes = (
            clip_of(cfg),
            guidance_of(cfg.task, cfg.sampler),
            passes_of(cfg, text_tokens, chunk),
        )
        stretches, grid = passes[0].stretches, grid_of(cfg.topology)
        costs = denoise_costs(
            size,
            passes=passes,
            cfg=cfg.topology.cfg,
            grid=grid,
            element_bytes=element_bytes,
            per_node=cfg.topology.ranks_per_node,
            nested=cfg.task.name is TaskName.transfer,
            on_host=cfg.topology.device == Device.cpu,
        )
        return cls(
            size=size,
            modalities=frozenset(stretch.modality for stretch in stretches),
            latent_elements=clip.latent_frames * clip.latent_rows * clip.latent_cols * cfg.model.vae.z_dim,
            controls=len(stretches) - 1 if cfg.task.name is TaskName.transfer else 0,
            text_tokens=tuple({one.negative: one.text for one in passes}.values()),
            grid=grid,
            rows=even_rows(passes[0].rows, grid.ranks),
            costs=costs,
            element_bytes=element_bytes,
            prompts=-(-len(prompts_of(cfg.task)) // cfg.topology.dp),
            guidance=guidance,
            steps=Counter(passes_of_steps(cfg)),
            residuals=cfg.sampler.cache.residual_order + 1 if caches(cfg) else 0,
            distilled=cfg.model.distilled_sigmas is not None,
        )

    @property
    def again(self) -> bool:
        """Whether a rank denoises more than once."""
        return self.prompts > 1 or self.chunks > 1

    @property
    def computed(self) -> dict[str, int]:
        """How often each guidance pass is computed for a clip, by its name."""
        return {
            one.name: self.chunks * sum(times for numbers, times in self.steps.items() if number in numbers)
            for number, one in enumerate(self.guidance.passes)
        }

    def text_bytes(self, place: int) -> int:
        """Bytes of the encoded prompts of one clip on the rank with `costs[place]`."""
        return sum(text.cache_bytes for text in self.costs[place].texts)

    def waiting_bytes(self, place: int) -> int:
        """Bytes of the encoded prompts of all clips, which wait on the host; 0 if there is one clip."""
        if self.prompts == 1:
            return 0
        return sum(self._times(text) * text.cache_bytes for text in self.costs[place].texts)

    def _times(self, text: TextCost) -> int:
        """How often a run encodes this prompt: a negative prompt once, because all clips share it."""
        return 1 if text.negative else self.prompts

    def text_stage(self, cfg: Config, place: int, weights: WeightsCost) -> RankStage:
        """The text stage on the rank with `costs[place]`."""
        cost, accelerator, on_cpu = self.costs[place], accelerator_of(cfg), cfg.topology.device == Device.cpu
        flops, sent = 0, Wire()
        for text in cost.texts:
            flops += self._times(text) * text.flops
            sent += text.sequence * self._times(text)
        held = self.text_bytes(place)
        if self.prompts > 1:
            # An accelerator moves the encoded prompts to the host layer by layer.
            one_layer = max(text.cache_bytes for text in cost.texts) // self.size.num_hidden_layers
            held = self.waiting_bytes(place) if on_cpu else one_layer
        return RankStage(
            flops=flops,
            weight_bytes=weights.text_bytes,
            text_bytes=held,
            activation_bytes=self.text_activation_bytes(place, on_cpu=on_cpu),
            sent=sent,
            seconds={
                "compute": flops / self._rate(cfg),
                "memory": weights.text_read / accelerator.memory_bytes_per_s,
                "weights": weights.text_read / accelerator.host_bytes_per_s,
                "link": _sequence_seconds(accelerator, sent),
            },
            share={"text_tokens": list(self.text_tokens), "prompts": self.prompts},
        )

    def stage(self, cfg: Config, place: int, weights: WeightsCost, *, vae: int, stays: bool) -> RankStage:
        """The denoise stage on the rank with `costs[place]`, which also holds `vae` bytes of VAE weights.

        If the generation pathway `stays` on the device, a later chunk has its first layer already.
        """
        first = self._chunk_stage(cfg, place, weights, vae=vae)
        if self.later is None:
            return first
        if stays:
            weights = replace(weights, gathered_ahead=Wire())
        return first.then(self.later._chunk_stage(cfg, place, weights, vae=vae).times(self.chunks - 1))

    def _chunk_stage(self, cfg: Config, place: int, weights: WeightsCost, *, vae: int) -> RankStage:
        cost, steps, topology = self.costs[place], cfg.sampler.steps, cfg.topology
        accelerator, per_node = accelerator_of(cfg), topology.ranks_per_node
        on_cpu = topology.device == Device.cpu
        clip = cost.steps(self.steps)
        flops, sequence, guidance = cost.clip_flops + clip.flops, clip.sequence, clip.cfg
        # A rank that computes no pass of a step waits for the velocities of the other ranks.
        working = sum(times for numbers, times in self.steps.items() if cost.step(numbers).passes)
        # Each pass of each step reads the generation pathway's weights once.
        reads = clip.passes * self.size.num_hidden_layers * self.size.pathway_matrix_elements
        gathered = weights.gathered * steps + weights.gathered_ahead
        link = _sequence_seconds(accelerator, sequence)
        outer = topology.cfg * self.grid.ranks
        link += accelerator.wire_seconds(guidance.bytes, guidance.messages, crosses_nodes=outer > per_node)
        brought = working * weights.copied / accelerator.host_bytes_per_s
        brought += accelerator.wire_seconds(
            gathered.bytes, gathered.messages, crosses_nodes=replica_ranks(topology) > per_node
        )
        return RankStage(
            flops=flops,
            weight_bytes=weights.vision_bytes + vae,
            text_bytes=max(self.text_bytes(place), self.waiting_bytes(place) if on_cpu else 0),
            activation_bytes=self.activation_bytes(place, on_cpu=on_cpu),
            sent=sequence + guidance + gathered,
            seconds={
                "compute": flops / self._rate(cfg),
                "memory": reads * self.element_bytes / accelerator.memory_bytes_per_s,
                "weights": brought,
                "link": link,
            },
            share={"tokens": self.rows[cost.sequence_rank], "passes": len(cost.passes)},
            sent_ahead=weights.gathered_ahead,
            noise_bytes=steps * self.latent_elements * FP32_BYTES if self.distilled else 0,
        )

    def _rate(self, cfg: Config) -> float:
        accelerator = accelerator_of(cfg)
        return accelerator.flops_per_s[cfg.model.dtype] * accelerator.efficiency["transformer"]

    def activation_bytes(self, place: int, *, on_cpu: bool) -> int:
        """Peak bytes of denoising beside weights and text, on the rank with `costs[place]`.

        The peak is in attention or in the MLP of `ParallelTransformer.hidden`. A CPU computes the MLP's
        intermediates in parts, and a half-precision norm as several fp32 passes. On an accelerator a norm is one
        kernel, and the product of a gated MLP takes the memory of its gate.
        """
        cost, latents = self.costs[place], self.latent_elements * FP32_BYTES
        rank, passes = cost.sequence_rank, len(cost.passes)
        text = self.grid.text(max(self.text_tokens), rank)
        vision = self._layer_bytes(
            self.grid, self.rows, rank, before=text.stop - text.start, passes=passes, on_cpu=on_cpu
        )
        vision += self.controls * latents
        if self.element_bytes != FP32_BYTES:  # a copy in the model's dtype
            vision += self.controls * self.latent_elements * self.element_bytes
        in_model, in_sampler = LATENTS_IN_MODEL, LATENTS_IN_SAMPLER
        if self.distilled:
            in_model, in_sampler = DISTILLED_LATENTS_IN_MODEL, DISTILLED_LATENTS_IN_SAMPLER
        if self.residuals and place == 0:
            in_sampler = LATENTS_COMPARED + max(in_sampler, in_model + LATENTS_IN_FILTER)
            in_model += LATENTS_COMPARED
        # A cache remembers what the layers added to the rank's tokens.
        kept = self.residuals * passes * self.rows[rank] * self.size.hidden_size * self.element_bytes
        return kept + max(vision + in_model * latents, in_sampler * latents)

    def text_activation_bytes(self, place: int, *, on_cpu: bool) -> int:
        """Peak bytes of a text layer: it computes the longest prompt while the other prompts wait."""
        cost, ranks = self.costs[place], self.grid.ulysses
        rank = cost.sequence_rank % ranks
        prompts = Counter[int]()  # how many have so many tokens
        for text in cost.texts:
            prompts[text.tokens] += self._times(text)
        longest = even_rows(max(prompts), ranks)
        if self.size.num_hidden_layers == 1:  # the only layer makes keys and values alone
            keys = 3 * self.size.num_key_value_heads * self.size.head_dim
            return longest[rank] * (2 * self.size.hidden_size + keys) * self.element_bytes
        prompts[max(prompts)] -= 1
        waiting = sum(
            times * (even_rows(tokens, ranks)[rank] * self.size.hidden_size + 2 * tokens * self.size.head_dim)
            for tokens, times in prompts.items()
        )
        held = waiting * self.element_bytes
        held += self._layer_bytes(Grid(ranks), longest, rank, before=0, passes=1, on_cpu=on_cpu)
        if self.prompts == 1 or on_cpu:  # the peak is before the last layer's keys and values are made
            held -= sum(self._times(text) * text.cache_bytes for text in cost.texts) // self.size.num_hidden_layers
        return max(held, 0)

    def _layer_bytes(
        self, grid: Grid, rows: Sequence[int], rank: int, *, before: int, passes: int, on_cpu: bool
    ) -> int:
        """Peak bytes of a layer for `rows` tokens per rank, which also attend to `before` text tokens.

        Each of the `passes` has at most these tokens.
        """
        size, n = self.size, rows[rank]
        asking, asked = (sum(rows[other] for other in held) for held in (grid.row(rank), grid.column(rank)))
        shares = head_shares(size.num_attention_heads, size.num_key_value_heads, grid.ulysses)
        share = shares[rank % grid.ulysses]
        queries, keys = share.num_queries * size.head_dim, share.num_keys * size.head_dim
        # The hidden states of every pass, and the projections of this layer.
        held = n * (passes * size.hidden_size + size.projection_width)
        if not before:  # freed: queries and keys once normed, all projections once sent
            held -= n * (size.projection_width if grid.ranks > 1 else keys)
        if not before and size.norms_text_keys_again:
            held += asked * keys
        held += passes * 2 * (asking if grid.groups == 1 else asking + asked) * size.head_dim  # rotary angles
        attended = asking * queries
        if grid.ranks > 1:
            held += asking * queries + asked * 2 * keys  # the projections after the exchange
        attention = held + asking * queries + 2 * (before + asked) * keys + attended
        part, intermediates = n, 2
        if on_cpu:
            part = n // mlp_parts(n, size.intermediate_size * self.element_bytes)
            intermediates = 3 if size.gated else 2
        mlp = held + attended + 2 * n * size.hidden_size + part * intermediates * size.intermediate_size
        whole = n * size.num_attention_heads * size.head_dim
        if grid.ranks > 1:
            mlp += whole
        if grid.columns > 1:  # partial results as sent and as received, and their sum
            wide = 2 * whole * FP32_BYTES // self.element_bytes
            attention = max(attention, held + 2 * attended + grid.columns * whole + wide)
        fused = not on_cpu or self.element_bytes == FP32_BYTES
        norm = 0 if fused else 2 * n * size.hidden_size * FP32_BYTES
        return max(max(attention, mlp) * self.element_bytes, (held + attended) * self.element_bytes + norm)


def _sequence_seconds(accelerator: Accelerator, sent: Wire) -> float:
    """Seconds for a rank to send its messages within its sequence, on its node and to other nodes."""
    near = accelerator.wire_seconds(sent.bytes - sent.far_bytes, sent.messages, crosses_nodes=False)
    return near + accelerator.wire_seconds(sent.far_bytes, 0, crosses_nodes=True)
