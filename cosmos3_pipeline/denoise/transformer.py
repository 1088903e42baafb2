"""`Cosmos3OmniTransformer` over several ranks, with the text pathway computed once per prompt.

In a Cosmos3 layer the text (understanding pathway) attends to itself alone, causally, and what is generated
(vision, sound and actions, the generation pathway) attends to both. So what the text contributes, its keys and
values in every layer, does not depend on the noise: it is computed once, a step runs the generation pathway
only. diffusers' seam for several ranks (`_cp_shard_fn`) sits inside a forward that runs both pathways each
time, so it is not used; the model's layers, embeddings and packing are, and the diffusers object is left as it
is.

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
from cosmos3_pipeline.denoise.shards import BLOCK_ROWS, even_rows, start_of
from cosmos3_pipeline.denoise.texts import EncodedText
from cosmos3_pipeline.distributed.host_path import takes_host_path
from cosmos3_pipeline.errors import Refusal


@dataclass(frozen=True)
class Share:
    """This rank's part of the tokens of one modality, `rows` of their own count.

    `noisy_rows` says how many are denoised on each rank, `own_noisy` which of the own rows; None is all of them.
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
    """What one guidance pass over one prompt needs in every step and does not change between them."""

    text: EncodedText
    rotary: tuple[Rotary, Rotary]  # of the queries with which this rank attends, and of the keys but the text's
    rows: tuple[int, ...]  # the tokens, but for the text's, held by each rank of the sequence
    shares: tuple[Share, ...]  # of each modality, in the order of the sequence

    @property
    def predicted(self) -> tuple[int, ...]:
        """The values that each rank predicts: of its noisy tokens."""
        ranks = range(len(self.rows))
        return tuple(sum(share.noisy_rows[rank] * share.channels for share in self.shares) for rank in ranks)


class ParallelTransformer:
    """A diffusers `Cosmos3OmniTransformer` whose steps run without the text, split over the ranks of `sequence`.

    Nothing is installed in `transformer`: it stays usable by itself, also between two calls here. All ranks
    of it must make the same calls with the same arguments. `layers` is where its layers come from; without
    it they are those of `transformer`, which is then loaded as a whole.

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
        """Lay out the tokens of `items` after `text`.

        The joint sequence is the prompt followed by all other tokens; `position_ids` [3, sequence] and the noisy
        tokens of `items` count through it. Raises CpLayoutError where a group of the grid would have no tokens.
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
        asked = asking  # the same tokens in one group
        if grid.groups > 1:
            asked = rotary_of(self._model, torch.cat([parts[rank] for rank in column], dim=1))
        return PreparedPass(text, (asking, asked), rows, tuple(shares))

    def _share(self, items: Items, first: int, edges: Sequence[int]) -> Share:
        """The share of `items`, whose tokens begin at `first`; rank r holds the sequence from edges[r] on."""
        last = first + items.tokens
        noisy = items.noisy.cpu()  # once for a clip; the device has nothing to do yet that would be waited for
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
        """Own tokens [n, hidden] of `latents`, which has those of each modality by its name.

        Latents and noise level are the same for every guidance pass over the same tokens, so one call serves
        them all. `timestep` [1] is the same for all noisy tokens of a step.
        """
        here = [share for share in prepared.shares if share.own] or prepared.shares[:1]
        levels: dict[int, Tensor] = {}
        parts = [self._embed(share, latents[share.items.modality.name], timestep, levels) for share in here]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _embed(self, share: Share, latents: list[Tensor], timestep: Tensor, levels: dict[int, Tensor]) -> Tensor:
        """As `embed`, of one modality. `levels` keeps the embedded noise level by its rows."""
        modality, items = share.items.modality, share.items
        tokens = modality.pack(self._model, latents, items)[share.rows]
        hidden = modality.project_in(self._model, tokens, items)
        noisy = sum(share.noisy_rows)
        if not noisy:
            return hidden
        # One row would do, but diffusers embeds every noisy token: a block of rows has the same bits. Where
        # threads share a product on a CPU they round its last rows differently: there it takes as many rows.
        threaded = self._exchange.ranks == 1 and takes_host_path(hidden) and torch.get_num_threads() > 1
        rows = noisy if threaded else min(noisy, BLOCK_ROWS)
        if rows not in levels:
            levels[rows] = self._noise_level(timestep, rows).to(hidden.dtype)
        level = levels[rows] if threaded else levels[rows][:1]
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
        """Own tokens [n, hidden] of each pass after all layers and the last norm, one pass after the other.

        `embedded` are own tokens [n, hidden] of each pass. A layer serves all passes before the next one comes.
        Without a pass, the layers come only where other ranks gather them with this one.
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
        """The velocity of own noisy tokens, flat: modality after modality, token after token.

        `hidden` [n, hidden] are the tokens that `ParallelTransformer.hidden` yields for the pass.
        """
        start, found = 0, []
        for share in prepared.shares:
            velocity = share.items.modality.project_out(
                self._model, hidden[start : start + share.own], share.items
            )
            found.append((velocity if share.own_noisy is None else velocity[share.own_noisy]).reshape(-1))
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
        """The flat velocity of all ranks' noisy tokens, rank after rank, from that of own ones."""
        return self._exchange.gather_rows(velocity, prepared.predicted)

    @torch.no_grad()
    def assemble(
        self, prepared: PreparedPass, gathered: Tensor, latents: Mapping[str, list[Tensor]]
    ) -> dict[str, list[Tensor]]:
        """The velocity of each of `latents`, by modality, from what `gather` returns.

        Clean (conditioned) frames are zero, as diffusers' mask makes them.
        """
        parts: list[list[Tensor]] = [[] for _ in prepared.shares]
        start = 0
        for rank in range(len(prepared.rows)):
            for share, part in zip(prepared.shares, parts, strict=True):
                stop = start + share.noisy_rows[rank] * share.channels
                part.append(gathered[start:stop])
                start = stop
        # Of one modality, all ranks' values stand one after the other already.
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
