"""Attention over this rank's heads with PyTorch's fused kernels: no S x S matrix, grouped key/value heads.

The arithmetic follows diffusers' `Cosmos3AttnProcessor` operation by operation, so the result is the same to the
last bit. Only which tensors are stored, and when, differs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import Cosmos3OmniTransformer
from torch import Tensor

from cosmos3_pipeline.denoise.attention_kernel import attention, partial_attention
from cosmos3_pipeline.denoise.pathway import Pathway, is_fused, normalise
from cosmos3_pipeline.denoise.shards import HeadShare
from cosmos3_pipeline.distributed.host_path import takes_host_path
from cosmos3_pipeline.fused.transformer import rotated


class Rotary(NamedTuple):
    """Cosines and sines of the rotary position embedding, each [tokens, 1, D], in the model's dtype."""

    cos: Tensor
    sin: Tensor


class TextKeyValue(NamedTuple):
    """One layer's keys and values of the prompt, each [tokens, this rank's key/value heads, D], rotated."""

    key: Tensor
    value: Tensor

    def to(self, device: torch.device) -> TextKeyValue:
        """These keys and values on `device`; this object itself if they are there already."""
        return self if self.key.device == device else TextKeyValue(self.key.to(device), self.value.to(device))

    @property
    def nbytes(self) -> int:
        return self.key.nbytes + self.value.nbytes


def norm_and_rotate(norm: Any, x: Tensor, rotary: Rotary, out: Tensor | None = None) -> Tensor:
    """Norm the heads `x` [tokens, heads, D] and rotate them by their positions; write to `out` unless None."""
    if not is_fused(norm, x):
        return rotated(normalise(norm, x), *rotary, out)
    if out is None:
        out = x.new_empty(x.shape)
    torch.ops.cosmos3.norm_rotate(x, norm.weight, norm.eps, *rotary, out=out)
    return out


def attend(query: Tensor, key: Tensor, value: Tensor, share: HeadShare, *, causal: bool) -> Tensor:
    """Attention of query [n, heads, D] over key and value [m, key/value heads, D]; returns [n, heads, D].

    The kernels need groups of equal size. A rank may hold only some query heads of a group. Then an accelerator
    calls the kernel once per run of equal groups, and a CPU copies the key/value head for each query head.
    """
    if share.grouped:
        return attention(query, key, value, causal=causal)
    if takes_host_path(query):
        key_of_query = torch.tensor(share.key_of_query)
        key, value = key.index_select(1, key_of_query), value.index_select(1, key_of_query)
        return attention(query, key, value, causal=causal)
    out = query.new_empty(query.shape)
    for queries, keys in share.equal_groups:
        out[:, queries] = attention(query[:, queries], key[:, keys], value[:, keys], causal=causal)
    return out


def attend_with_text(
    layer: Pathway,
    heads: tuple[Tensor, Tensor, Tensor],
    rotary: tuple[Rotary, Rotary],
    text: TextKeyValue,
    share: HeadShare,
    *,
    partially: bool,
) -> tuple[Tensor, Tensor | None]:
    """Full attention of vision's queries [n, heads, D] over the prompt and vision's keys and values [m, heads, D].

    Queries and keys arrive as projected, and are normed and rotated here. `rotary` has the queries' angles first,
    then the keys'. With `partially` the keys are a subset: the second result [n, heads] merges partial results.
    """
    query, key, value = heads
    prompt = text.key.shape[0]
    keys = key.new_empty(prompt + key.shape[0], *key.shape[1:])
    keys[:prompt] = text.key
    norm_and_rotate(layer.key_norm, key, rotary[1], out=keys[prompt:])
    query = norm_and_rotate(layer.query_norm, query, rotary[0])
    values = torch.cat([text.value, value])
    if not partially:
        return attend(query, keys, values, share, causal=False), None
    if not share.grouped:
        key_of_query = torch.tensor(share.key_of_query, device=keys.device)
        keys, values = keys.index_select(1, key_of_query), values.index_select(1, key_of_query)
    return partial_attention(query, keys, values)


def rotary_of(transformer: Cosmos3OmniTransformer, position_ids: Tensor) -> Rotary:
    """Rotary cosines and sines of tokens at `position_ids` [3, tokens], in the dtype of `transformer`."""
    cos, sin = transformer.rotary_emb(
        position_ids=position_ids.unsqueeze(1), device=position_ids.device, dtype=transformer.dtype
    )
    return Rotary(cos.squeeze(0).unsqueeze(1), sin.squeeze(0).unsqueeze(1))
