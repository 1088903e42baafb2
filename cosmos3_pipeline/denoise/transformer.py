"""`Cosmos3OmniTransformer` over several ranks, with the text pathway computed once per prompt.

In a Cosmos3 layer the text (understanding pathway) attends to itself alone, causally, and vision (generation
pathway) attends to both. So what the text contributes, its keys and values in every layer, does not depend
on the noise: `prepare` computes it once, `predict` runs vision only. diffusers' own seam for several ranks
(`_cp_shard_fn`) sits inside a forward that runs both pathways each time, so it is not used; the model's
layers, embeddings and packing are, and the diffusers object is left as it is.

Source: diffusers `models/transformers/transformer_cosmos3.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers import Cosmos3OmniTransformer
from diffusers.models.transformers.transformer_cosmos3 import Cosmos3AttnProcessor
from torch import Tensor

from cosmos3_pipeline.denoise.attention import Rotary, TextKeyValue, attend_with_text, rotary_of
from cosmos3_pipeline.denoise.checks import check_layout
from cosmos3_pipeline.denoise.exchange import Exchange, OwnHeads
from cosmos3_pipeline.denoise.layers import Layers, LoadedLayers
from cosmos3_pipeline.denoise.pathway import Pathway, normalise
from cosmos3_pipeline.denoise.shards import BLOCK_ROWS, even_rows, start_of
from cosmos3_pipeline.denoise.texts import EncodedText
from cosmos3_pipeline.distributed.host_path import takes_host_path
from cosmos3_pipeline.errors import Refusal


@dataclass(frozen=True)
class PreparedPass:
    """What one guidance pass over one prompt needs in every step and does not change between them."""

    text: EncodedText
    rotary: Rotary  # of all vision tokens
    rows: tuple[int, ...]  # vision tokens held by each ulysses rank
    noisy_rows: tuple[int, ...]  # how many of them are denoised
    own_noisy: Tensor | None  # which own rows those are; None is all
    token_shapes: list[tuple[int, int, int]]
    noisy_frames: list[Tensor]


class ParallelTransformer:
    """A diffusers `Cosmos3OmniTransformer` whose steps run vision only, split over the ranks of `ulysses`.

    Nothing is installed in `transformer`: it stays usable by itself, also between two calls here. All ranks
    of the axis must make the same calls with the same arguments. `layers` is where its layers come from; without
    it they are those of `transformer`, which is then loaded as a whole.

    Raises:
        UlyssesLayoutError: the model's heads do not divide over the axis.
        Refusal: the transformer carries a cache or an attention processor that would be bypassed.
    """

    def __init__(
        self,
        transformer: Cosmos3OmniTransformer,
        *,
        ulysses: Exchange | None = None,
        layers: Layers | None = None,
    ) -> None:
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
        self._heads = OwnHeads.of(transformer, self._exchange)
        self._layers = LoadedLayers(transformer) if layers is None else layers

    @torch.no_grad()
    def prepare(
        self,
        text: EncodedText,
        *,
        position_ids: Tensor,
        vision_token_shapes: list[tuple[int, int, int]],
        vision_mse_loss_indexes: Tensor,
        vision_noisy_frame_indexes: list[Tensor],
    ) -> PreparedPass:
        """Lay out the vision tokens after `text`. The other arguments are those of the model's `forward`.

        The joint sequence is the prompt followed by all vision tokens; `position_ids` [3, sequence] and
        `vision_mse_loss_indexes`, the noisy tokens, count through it.
        """
        prompt = len(text.layers[0].key)
        rows = even_rows(position_ids.shape[-1] - prompt, self._exchange.ranks)
        edges = [prompt + start_of(rows, rank) for rank in range(len(rows) + 1)]
        noisy = [
            vision_mse_loss_indexes[(vision_mse_loss_indexes >= start) & (vision_mse_loss_indexes < stop)] - start
            for start, stop in pairwise(edges)
        ]
        own = noisy[self._exchange.rank]
        return PreparedPass(
            text=text,
            rotary=rotary_of(self._model, position_ids[:, prompt:]),
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
        threaded = self._exchange.ranks == 1 and takes_host_path(hidden) and torch.get_num_threads() > 1
        rows = max(noisy if threaded else min(noisy, BLOCK_ROWS), 1)
        embedded = model.time_embedder(frequencies.expand(rows, -1)).to(hidden.dtype)
        embedded = embedded if threaded and noisy else embedded[:1]
        if prepared.own_noisy is None:
            hidden += embedded
        else:
            hidden.index_add_(0, prepared.own_noisy, embedded.expand(len(prepared.own_noisy), -1))
        return hidden, latent_shapes

    @torch.no_grad()
    def predict(self, passes: Sequence[PreparedPass], embedded: Tensor) -> list[Tensor]:
        """The velocity of own noisy tokens, [n, patch_latent_dim], of each pass over the same latents.

        `embedded` [n, hidden] are own vision tokens. A layer serves all passes before the next one comes.
        """
        hidden = [embedded] * len(passes)
        del embedded
        for number, layer in enumerate(self._layers.vision()):
            for index, prepared in enumerate(passes):
                hidden[index] = self._run_vision(layer, prepared, prepared.text.layers[number], hidden[index])
        velocities = []
        for prepared in passes:
            velocity = self._model.proj_out(normalise(self._model.norm_moe_gen, hidden.pop(0)))
            velocities.append(velocity if prepared.own_noisy is None else velocity[prepared.own_noisy])
        return velocities

    def _run_vision(self, layer: Pathway, prepared: PreparedPass, text: TextKeyValue, hidden: Tensor) -> Tensor:
        heads = layer.project(hidden, self._model.config.head_dim)
        own_heads = self._exchange.heads_for_rows(*heads, prepared.rows, self._heads.shares)
        attended = attend_with_text(layer, own_heads, prepared.rotary, text, self._heads.own)
        return layer.finish(hidden, self._exchange.rows_for_heads(attended, prepared.rows))

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
