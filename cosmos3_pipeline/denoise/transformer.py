"""`Cosmos3OmniTransformer` over several ranks, with the text pathway computed once per prompt.

In a Cosmos3 layer the text (understanding pathway) attends only to itself, causally. Vision, sound and actions
(generation pathway) attend to both pathways. The text's keys and values in every layer therefore do not depend on
the noise: they are computed once, and a step runs only the generation pathway. diffusers' hook for several ranks
(`_cp_shard_fn`) is not used, because it is inside a forward that always runs both pathways. The model's layers,
embeddings and packing functions are called, and the diffusers object is not changed.

Source: diffusers `models/transformers/transformer_cosmos3.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers import Cosmos3OmniTransformer
from diffusers.models.transformers.transformer_cosmos3 import Cosmos3AttnProcessor
from torch import Tensor

from cosmos3_pipeline.denoise.attention import Rotary, TextKeyValue, attend_with_text, rotary_of
from cosmos3_pipeline.denoise.checks import check_layout, check_tokens
from cosmos3_pipeline.denoise.exchange import Exchange, OwnHeads
from cosmos3_pipeline.denoise.layers import Layers, LoadedLayers
from cosmos3_pipeline.denoise.modalities import Items
from cosmos3_pipeline.denoise.pathway import Pathway, normalise
from cosmos3_pipeline.denoise.shards import even_rows, level_rows, start_of
from cosmos3_pipeline.denoise.texts import EncodedText
from cosmos3_pipeline.distributed.host_path import takes_host_path
from cosmos3_pipeline.errors import Refusal


@dataclass(frozen=True)
class Share:
    """This rank's shard of the tokens of one modality: `rows` of the modality's tokens.

    `noisy_rows` says how many tokens are denoised on each rank. `own_noisy` has the indices of this rank's
    denoised tokens within its shard; None means all of them.
    """

    items: Items
    channels: int
    rows: slice
    noisy_rows: tuple[int, ...]
    own_noisy: Tensor | None

    @property
    def own(self) -> int:
        return int(self.rows.stop - self.rows.start)


@dataclass(frozen=True)
class PreparedPass:
    """Everything that one guidance pass over one prompt needs and that stays the same in all steps."""

    text: EncodedText
    rotary: tuple[Rotary, Rotary]  # of this rank's queries, and of its keys without the text's
    rows: tuple[int, ...]  # the number of tokens on each rank of the sequence, without the text's
    shares: tuple[Share, ...]  # one for each modality, in the order of the sequence

    @property
    def predicted(self) -> tuple[int, ...]:
        """The number of values that each rank predicts, which are those of its noisy tokens."""
        ranks = range(len(self.rows))
        return tuple(sum(share.noisy_rows[rank] * share.channels for share in self.shares) for rank in ranks)


class ParallelTransformer:
    """A diffusers `Cosmos3OmniTransformer` whose steps run without the text, sharded over the ranks of `sequence`.

    `transformer` is not modified and can also be called directly at any time. All ranks of `sequence` must make
    the same calls with the same arguments. `layers` is the source of the layers; without it `transformer` must be
    loaded as a whole, and its layers are used.

    Raises:
        UlyssesLayoutError: the model's heads do not divide over a group of its grid.
        Refusal: the transformer carries a cache or an attention processor that would be bypassed.
    """

    def __init__(
        self,
        transformer: Cosmos3OmniTransformer,
        *,
        sequence: Exchange | None = None,
        layers: Layers | None = None,
    ) -> None:
        config = transformer.config
        self._model = transformer
        self._exchange = Exchange() if sequence is None else sequence
        check_layout(
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            cfg=1,
            ulysses=self._exchange.grid.ulysses,
            guidance_scale=1.0,
        )
        _refuse_what_would_be_bypassed(transformer)
        self._heads = OwnHeads.of(transformer, self._exchange)
        self._layers = LoadedLayers(transformer) if layers is None else layers

    @torch.no_grad()
    def prepare(self, text: EncodedText, *, position_ids: Tensor, items: tuple[Items, ...]) -> PreparedPass:
        """Shard the tokens of `items`, which follow `text` in the joint sequence, over the ranks.

        `position_ids` [3, sequence] and the noisy tokens of `items` are indexed by the joint sequence: the prompt,
        then all other tokens. Raises CpLayoutError if a group of the grid would have no tokens.
        """
        tokens = sum(one.tokens for one in items)
        grid, prompt = self._exchange.grid, position_ids.shape[-1] - tokens
        check_tokens(tokens, grid)
        rows = even_rows(tokens, grid.ranks)
        edges = [prompt + start_of(rows, rank) for rank in range(len(rows) + 1)]
        shares, first = [], prompt
        for one in items:
            shares.append(self._share(one, first, edges))
            first += one.tokens
        parts = position_ids[:, prompt:].split(list(rows), dim=1)
        row, column = grid.row(self._exchange.rank), grid.column(self._exchange.rank)
        asking = rotary_of(self._model, torch.cat([parts[rank] for rank in row], dim=1))
        asked = asking  # in one group, queries and keys are of the same tokens
        if grid.groups > 1:
            asked = rotary_of(self._model, torch.cat([parts[rank] for rank in column], dim=1))
        return PreparedPass(text, (asking, asked), rows, tuple(shares))

    def _share(self, items: Items, first: int, edges: Sequence[int]) -> Share:
        """The share of `items`, which begin at token `first`; rank r has tokens edges[r] to edges[r + 1]."""
        last = first + items.tokens
        noisy = items.noisy.cpu()  # waits for the device, but only once per clip, while it is idle
        own = [min(max(edge, first), last) for edge in edges[self._exchange.rank :][:2]]
        mine = noisy[(noisy >= own[0]) & (noisy < own[1])] - own[0]
        counted = [int(((noisy >= start) & (noisy < stop)).sum()) for start, stop in pairwise(edges)]
        return Share(
            items,
            channels=items.modality.channels(self._model),
            rows=slice(own[0] - first, own[1] - first),
            noisy_rows=tuple(counted),
            own_noisy=None if len(mine) == own[1] - own[0] else mine.to(items.noisy.device),
        )

    @torch.no_grad()
    def embed(self, prepared: PreparedPass, latents: Mapping[str, list[Tensor]], timestep: Tensor) -> Tensor:
        """Embed this rank's tokens [n, hidden] of `latents`, a list of tensors for each modality's name.

        Latents and noise level are the same for every guidance pass over the same tokens, so one call serves all
        of these passes. `timestep` [1] is the same for all noisy tokens of a step.
        """
        here = [share for share in prepared.shares if share.own] or prepared.shares[:1]
        levels: dict[int, Tensor] = {}
        parts = [self._embed(share, latents[share.items.modality.name], timestep, levels) for share in here]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _embed(self, share: Share, latents: list[Tensor], timestep: Tensor, levels: dict[int, Tensor]) -> Tensor:
        """As `embed`, for one modality. `levels` caches the embedded noise level, by its number of rows."""
        modality, items = share.items.modality, share.items
        tokens = modality.pack(self._model, latents, items)[share.rows]
        hidden = modality.project_in(self._model, tokens, items)
        noisy = sum(share.noisy_rows)
        if not noisy:
            return hidden
        at_most = level_rows(self._exchange.ranks, on_host=takes_host_path(hidden))
        rows = min(noisy, at_most or noisy)
        if rows not in levels:
            levels[rows] = self._noise_level(timestep, rows).to(hidden.dtype)
        # All rows are meant to be equal; where they are not, each token has its own as in diffusers.
        level = levels[rows] if at_most is None else levels[rows][:1]
        if share.own_noisy is None:
            return hidden.add_(level)
        return hidden.index_add_(0, share.own_noisy, level.expand(len(share.own_noisy), -1))

    def _noise_level(self, timestep: Tensor, rows: int) -> Tensor:
        """The embedding [rows, hidden] of `timestep` [1], every row the same."""
        model = self._model
        dtype = next(model.time_embedder.parameters()).dtype
        frequencies = model.time_proj(timestep * model.config.timestep_scale).to(dtype)
        level: Tensor = model.time_embedder(frequencies.expand(rows, -1))
        return level

    @torch.no_grad()
    def hidden(self, passes: Sequence[PreparedPass], embedded: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield this rank's tokens [n, hidden] after all layers and the last norm, pass by pass.

        `embedded` has this rank's tokens [n, hidden] of each pass. All passes run through a layer before the next
        layer is asked for. Without passes the layers are iterated only if they are shared, because other ranks
        gather them together with this rank.
        """
        if not passes and not self._layers.shared:
            return
        hidden = list(embedded)
        del embedded
        for number, layer in enumerate(self._layers.vision()):
            for index, prepared in enumerate(passes):
                hidden[index] = self._run_layer(layer, prepared, prepared.text.layers[number], hidden[index])
        while hidden:
            yield normalise(self._model.norm_moe_gen, hidden.pop(0))

    @torch.no_grad()
    def velocity(self, prepared: PreparedPass, hidden: Tensor) -> Tensor:
        """The flat velocity of this rank's noisy tokens, in order of modality, then token.

        `hidden` [n, hidden] is the output of `ParallelTransformer.hidden` for the pass.
        """
        start, found = 0, []
        for share in prepared.shares:
            noisy = hidden[start : start + share.own]
            if share.own_noisy is not None:
                noisy = noisy[share.own_noisy]
            found.append(share.items.modality.project_out(self._model, noisy, share.items).reshape(-1))
            start += share.own
        return found[0] if len(found) == 1 else torch.cat(found)

    def _run_layer(self, layer: Pathway, prepared: PreparedPass, text: TextKeyValue, hidden: Tensor) -> Tensor:
        heads = layer.project(hidden, self._model.config.head_dim)
        own_heads = self._exchange.heads_for_rows(heads, prepared.rows, self._heads.shares)
        attended, sums = attend_with_text(
            layer,
            own_heads,
            prepared.rotary,
            text,
            self._heads.own,
            partially=self._exchange.grid.columns > 1,
        )
        return layer.finish(hidden, self._exchange.rows_for_heads(attended, prepared.rows, sums))

    @torch.no_grad()
    def gather(self, prepared: PreparedPass, velocity: Tensor) -> Tensor:
        """Gather the flat velocity of all ranks' noisy tokens, in rank order; `velocity` is this rank's."""
        return self._exchange.gather_rows(velocity, prepared.predicted)

    @torch.no_grad()
    def assemble(
        self, prepared: PreparedPass, gathered: Tensor, latents: Mapping[str, list[Tensor]]
    ) -> dict[str, list[Tensor]]:
        """The velocity of each of `latents`, by modality; `gathered` is the result of `gather`.

        Clean (conditioning) frames are zero, as with diffusers' mask.
        """
        parts: list[list[Tensor]] = [[] for _ in prepared.shares]
        start = 0
        for rank in range(len(prepared.rows)):
            for share, part in zip(prepared.shares, parts, strict=True):
                stop = start + share.noisy_rows[rank] * share.channels
                part.append(gathered[start:stop])
                start = stop
        # With one modality, the values of all ranks are contiguous already.
        whole = [gathered] if len(parts) == 1 else [torch.cat(part) for part in parts]
        return {
            share.items.modality.name: share.items.modality.unpack(
                self._model, flat.view(-1, share.channels), share.items, latents[share.items.modality.name]
            )
            for share, flat in zip(prepared.shares, whole, strict=True)
        }


def _refuse_what_would_be_bypassed(transformer: Cosmos3OmniTransformer) -> None:
    if transformer.is_cache_enabled:
        raise Refusal(
            what=f"the transformer has a cache enabled ({type(transformer._cache_config).__name__})",
            why="parallel denoising calls the layers' parts, so the cache's hooks would never run",
            works="transformer.disable_cache(), and sampler/cache=seacache or ParallelLoopDenoiser(cache=...)",
        )
    for processor in transformer.attn_processors.values():
        backend = getattr(processor, "_attention_backend", None)
        if type(processor) is not Cosmos3AttnProcessor or backend is not None:
            raise Refusal(
                what=f"the transformer's attention is {type(processor).__name__} with backend {backend}",
                why="parallel denoising has its own attention, so the choice would be ignored",
                works="transformer.set_attn_processor(Cosmos3AttnProcessor())",
            )
