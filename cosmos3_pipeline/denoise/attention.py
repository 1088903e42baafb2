"""Attention over the heads that this rank holds, by PyTorch's fused kernels: no S x S matrix, grouped keys.

The arithmetic is that of diffusers' `Cosmos3AttnProcessor`, operation by operation, so that the result has
its bits; what differs is what is stored and when.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import Cosmos3OmniTransformer
from torch import Tensor


class Rotary(NamedTuple):
    """Cosines and sines of the rotary position embedding, each [tokens, 1, D], in the model's dtype."""

    cos: Tensor
    sin: Tensor


class TextKeyValue(NamedTuple):
    """One layer's keys and values of the prompt, each [tokens, own key/value heads, D], positions applied."""

    key: Tensor
    value: Tensor

    def to(self, device: torch.device) -> TextKeyValue:
        """The same on `device`; itself where it is there."""
        return self if self.key.device == device else TextKeyValue(self.key.to(device), self.value.to(device))

    @property
    def nbytes(self) -> int:
        return self.key.nbytes + self.value.nbytes


def rotate(x: Tensor, rotary: Rotary, out: Tensor | None = None) -> Tensor:
    """`x * cos + rotate_half(x) * sin` for x [tokens, heads, D], into `out` when given.

    Halves instead of a rotated copy: the same products and sums, so the same bits.
    """
    cos, sin = rotary
    half = x.shape[-1] // 2
    out = torch.mul(x, cos) if out is None else torch.mul(x, cos, out=out)
    out[..., :half] -= x[..., half:] * sin[..., :half]
    out[..., half:] += x[..., :half] * sin[..., half:]
    return out


def attend(query: Tensor, key: Tensor, value: Tensor, key_of_query: Tensor | None, *, causal: bool) -> Tensor:
    """Attention of query [n, heads, D] over key and value [m, key/value heads, D]; returns [n, heads, D].

    `key_of_query` [heads] is for a rank whose heads cut through a group: the kernels know equal groups alone,
    so there each query head gets its own copy of its key/value head. None is equal groups.
    """
    if key_of_query is not None:
        key, value = key.index_select(1, key_of_query), value.index_select(1, key_of_query)
    attended = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        is_causal=causal,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1)


def attend_with_text(
    query: Tensor, key: Tensor, value: Tensor, rotary: Rotary, text: TextKeyValue, key_of_query: Tensor | None
) -> Tensor:
    """Full attention of normed, unrotated vision heads [n, heads, D] over the prompt and themselves."""
    prompt = text.key.shape[0]
    keys = key.new_empty(prompt + key.shape[0], *key.shape[1:])
    keys[:prompt] = text.key
    rotate(key, rotary, out=keys[prompt:])
    return attend(rotate(query, rotary), keys, torch.cat([text.value, value]), key_of_query, causal=False)


def rotary_of(transformer: Cosmos3OmniTransformer, position_ids: Tensor) -> Rotary:
    """The angles of tokens at `position_ids` [3, tokens], in the dtype of `transformer`."""
    cos, sin = transformer.rotary_emb(
        position_ids=position_ids.unsqueeze(1), device=position_ids.device, dtype=transformer.dtype
    )
    return Rotary(cos.squeeze(0).unsqueeze(1), sin.squeeze(0).unsqueeze(1))
