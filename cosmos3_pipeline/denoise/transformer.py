"""`Cosmos3OmniTransformer` over several ranks, with the text pathway computed once per prompt.

In a Cosmos3 layer the text (understanding pathway) attends to itself alone, causally, and vision (generation
pathway) attends to both. So what the text contributes, its keys and values in every layer, does not depend
on the noise: `prepare` computes it once, `predict` runs vision only. diffusers' own seam for several ranks
(`_cp_shard_fn`) sits inside a forward that runs both pathways each time, so it is not used; the model's
layers, embeddings and packing are, and the diffusers object is left as it is.

Source: diffusers `models/transformers/transformer_cosmos3.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers import Cosmos3OmniTransformer
from diffusers.models.transformers.transformer_cosmos3 import Cosmos3AttnProcessor
from torch import Tensor

from cosmos3_pipeline.denoise.attention import Rotary, TextKeyValue, attend, attend_with_text, rotate
from cosmos3_pipeline.denoise.checks import check_layout
from cosmos3_pipeline.denoise.exchange import Exchange
from cosmos3_pipeline.denoise.pathway import Pathway, normalise
from cosmos3_pipeline.denoise.shards import BLOCK_ROWS, even_rows, head_shares, start_of
from cosmos3_pipeline.errors import Refusal


@dataclass(frozen=True)
class PreparedPass:
    """What one guidance pass over one prompt needs in every step and does not change between them."""

    text: tuple[TextKeyValue, ...]  # one per layer
    rotary: Rotary  # of all vision tokens
    rows: tuple[int, ...]  # vision tokens held by each ulysses rank
    noisy_rows: tuple[int, ...]  # how many of them are denoised
    own_noisy: Tensor | None  # which own rows those are; None is all
    token_shapes: list[tuple[int, int, int]]
    noisy_frames: list[Tensor]

    @property
    def text_bytes(self) -> int:
        """Bytes of the prompt's keys and values on this rank."""
        return sum(layer.nbytes for layer in self.text)


class ParallelTransformer:
    """A diffusers `Cosmos3OmniTransformer` whose steps run vision only, split over the ranks of `ulysses`.

    Nothing is installed in `transformer`: it stays usable by itself, also between two calls here. All ranks
    of the axis must make the same calls with the same arguments.

    Raises:
        UlyssesLayoutError: the model's heads do not divide over the axis.
        Refusal: the transformer carries a cache or an attention processor that would be bypassed.
    """

    def __init__(self, transformer: Cosmos3OmniTransformer, *, ulysses: Exchange | None = None) -> None:
        config = transformer.config
        self._model = transformer
        self._exchange = Exchange() if ulysses is None else ulysses
        ranks = self._exchange.ranks
        check_layout(
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            cfg=1,
            ulysses=ranks,
            guidance_scale=1.0,
        )
        _refuse_what_would_be_bypassed(transformer)
        self._shares = head_shares(config.num_attention_heads, config.num_key_value_heads, ranks)
        self._key_of_query: Tensor | None = None
        share = self._shares[self._exchange.rank]
        if not share.grouped:
            self._key_of_query = torch.tensor(share.key_of_query, device=transformer.device)
        self._text_layers = [Pathway.understanding(layer) for layer in transformer.layers]
        self._vision_layers = [Pathway.generation(layer) for layer in transformer.layers]

    @torch.no_grad()
    def prepare(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        vision_token_shapes: list[tuple[int, int, int]],
        vision_mse_loss_indexes: Tensor,
        vision_noisy_frame_indexes: list[Tensor],
    ) -> PreparedPass:
        """Run the text once and lay out the vision tokens. The arguments are those of the model's `forward`.

        The joint sequence is the prompt, `input_ids` [text tokens], followed by all vision tokens; `position_ids`
        [3, sequence] and `vision_mse_loss_indexes`, the noisy tokens, count through it.
        """
        prompt = len(input_ids)
        cos, sin = self._model.rotary_emb(
            position_ids=position_ids.unsqueeze(1),
            device=input_ids.device,
            dtype=self._model.embed_tokens.weight.dtype,
        )
        cos, sin = cos.squeeze(0).unsqueeze(1), sin.squeeze(0).unsqueeze(1)
        rows = even_rows(position_ids.shape[-1] - prompt, self._exchange.ranks)
        edges = [prompt + start_of(rows, rank) for rank in range(len(rows) + 1)]
        noisy = [
            vision_mse_loss_indexes[(vision_mse_loss_indexes >= start) & (vision_mse_loss_indexes < stop)] - start
            for start, stop in pairwise(edges)
        ]
        own = noisy[self._exchange.rank]
        return PreparedPass(
            text=self._run_text(input_ids, Rotary(cos[:prompt], sin[:prompt])),
            rotary=Rotary(cos[prompt:], sin[prompt:]),
            rows=rows,
            noisy_rows=tuple(len(indexes) for indexes in noisy),
            own_noisy=None if len(own) == rows[self._exchange.rank] else own,
            token_shapes=vision_token_shapes,
            noisy_frames=vision_noisy_frame_indexes,
        )

    @torch.no_grad()
    def embed(
        self, prepared: PreparedPass, vision_tokens: list[Tensor], timestep: Tensor
    ) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Own vision tokens [n, hidden] of the latents `vision_tokens` ([1, C, T, h, w] each), and their shapes.

        Latents and noise level are the same for every guidance pass, so one call serves all of a step.
        `timestep` [1] is the same for all noisy tokens of a step.
        """
        model = self._model
        packed, latent_shapes = model._patchify_and_pack_latents(vision_tokens)
        start = start_of(prepared.rows, self._exchange.rank)
        hidden = model.proj_in(packed[start : start + prepared.rows[self._exchange.rank]])
        embedder_dtype = next(model.time_embedder.parameters()).dtype
        frequencies = model.time_proj(timestep * model.config.timestep_scale).to(embedder_dtype)
        # One row would do, but diffusers embeds every noisy token: a block of rows has the same bits. Where
        # threads share a product on a CPU they round its last rows differently: there it takes as many rows.
        noisy = sum(prepared.noisy_rows)
        threaded = self._exchange.ranks == 1 and hidden.device.type == "cpu" and torch.get_num_threads() > 1
        rows = max(noisy if threaded else min(noisy, BLOCK_ROWS), 1)
        embedded = model.time_embedder(frequencies.expand(rows, -1)).to(hidden.dtype)
        embedded = embedded if threaded and noisy else embedded[:1]
        if prepared.own_noisy is None:
            hidden += embedded
        else:
            hidden.index_add_(0, prepared.own_noisy, embedded.expand(len(prepared.own_noisy), -1))
        return hidden, latent_shapes

    @torch.no_grad()
    def predict(self, prepared: PreparedPass, hidden: Tensor) -> Tensor:
        """The velocity of own noisy tokens, [n, patch_latent_dim], from own vision tokens `hidden` [n, hidden]."""
        head_dim = self._model.config.head_dim
        for layer, text in zip(self._vision_layers, prepared.text, strict=True):
            heads = layer.project(hidden, head_dim)
            query, key, value = self._exchange.heads_for_rows(*heads, prepared.rows, self._shares)
            attended = attend_with_text(
                normalise(layer.query_norm, query),
                normalise(layer.key_norm, key),
                value,
                prepared.rotary,
                text,
                self._key_of_query,
            )
            hidden = layer.finish(hidden, self._exchange.rows_for_heads(attended, prepared.rows))
        hidden = normalise(self._model.norm_moe_gen, hidden)
        velocity = self._model.proj_out(hidden)
        assert isinstance(velocity, Tensor)
        return velocity if prepared.own_noisy is None else velocity[prepared.own_noisy]

    @torch.no_grad()
    def assemble(
        self, prepared: PreparedPass, velocity: Tensor, latent_shapes: list[tuple[int, int, int]]
    ) -> list[Tensor]:
        """The velocity of every latent, [1, C, T, h, w] each, from every rank's own noisy tokens.

        Clean (conditioned) frames are zero, as diffusers' mask makes them.
        """
        velocities = self._model._unpatchify_and_unpack_latents(
            self._exchange.gather_rows(velocity, prepared.noisy_rows),
            token_shapes_vision=prepared.token_shapes,
            noisy_frame_indexes_vision=prepared.noisy_frames,
            original_latent_shapes=latent_shapes,
        )
        assert isinstance(velocities, list)
        return velocities

    def _run_text(self, input_ids: Tensor, rotary: Rotary) -> tuple[TextKeyValue, ...]:
        """Keys and values of the prompt in every layer, for own heads."""
        rows = even_rows(len(input_ids), self._exchange.ranks)
        start = start_of(rows, self._exchange.rank)
        hidden = self._model.embed_tokens(input_ids[start : start + rows[self._exchange.rank]])
        text: list[TextKeyValue] = []
        head_dim = self._model.config.head_dim
        for layer, block in zip(self._text_layers, self._model.layers, strict=True):
            # What the last layer makes of the text itself, nothing reads.
            last = len(text) == len(self._text_layers) - 1
            if last:
                key, value = self._exchange.keys_for_rows(
                    *layer.project_keys(hidden, head_dim), rows, self._shares
                )
            else:
                heads = layer.project(hidden, head_dim)
                query, key, value = self._exchange.heads_for_rows(*heads, rows, self._shares)
            normed = normalise(layer.key_norm, key)
            key = rotate(normed, rotary)
            vision_norm = block.self_attn.k_norm_und_for_gen
            key_for_vision = key if vision_norm is None else rotate(normalise(vision_norm, normed), rotary)
            # A view would keep the whole received message alive.
            text.append(TextKeyValue(key_for_vision, value.contiguous()))
            if not last:
                query = rotate(normalise(layer.query_norm, query), rotary)
                attended = attend(query, key, value, self._key_of_query, causal=True)
                hidden = layer.finish(hidden, self._exchange.rows_for_heads(attended, rows))
        return tuple(text)


def _refuse_what_would_be_bypassed(transformer: Cosmos3OmniTransformer) -> None:
    if transformer.is_cache_enabled:
        raise Refusal(
            what=f"the transformer has a cache enabled ({type(transformer._cache_config).__name__})",
            why="parallel denoising calls the layers' parts, so the cache's hooks would never run",
            works="transformer.disable_cache()",
        )
    for processor in transformer.attn_processors.values():
        backend = getattr(processor, "_attention_backend", None)
        if type(processor) is not Cosmos3AttnProcessor or backend is not None:
            raise Refusal(
                what=f"the transformer's attention is {type(processor).__name__} with backend {backend}",
                why="parallel denoising has its own attention, so the choice would be ignored",
                works="transformer.set_attn_processor(Cosmos3AttnProcessor())",
            )
