"""Prompts to keys and values: the text pathway runs once per prompt, and its results are kept for later clips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from diffusers import Cosmos3OmniTransformer
from torch import Tensor

from cosmos3_pipeline.denoise.attention import Rotary, TextKeyValue, attend, norm_and_rotate, rotary_of
from cosmos3_pipeline.denoise.exchange import Exchange, OwnHeads
from cosmos3_pipeline.denoise.layers import Layers
from cosmos3_pipeline.denoise.pathway import Pathway, normalise
from cosmos3_pipeline.denoise.shards import even_rows, start_of
from cosmos3_pipeline.fused.transformer import rotated

Prompt = tuple[Tensor, Tensor]  # token ids [n] and position ids [3, n]


@dataclass(frozen=True)
class EncodedText:
    """A prompt as the vision pathway reads it: its keys and values in every layer, for the heads of this rank.

    If the grid has several columns, each column has a different slice of the prompt.
    """

    layers: tuple[TextKeyValue, ...]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def to(self, device: torch.device) -> EncodedText:
        """A copy with all tensors on `device`; tensors that are there already are shared."""
        return EncodedText(tuple(layer.to(device) for layer in self.layers))


class TextEncoder:
    """Runs the text pathway of `transformer`, with layers from `layers`, over the ranks of `sequence`."""

    def __init__(self, transformer: Cosmos3OmniTransformer, *, sequence: Exchange, layers: Layers) -> None:
        self._model = transformer
        self._sequence = sequence
        self._exchange = sequence.of_text
        self._layers = layers
        self._heads = OwnHeads.of(transformer, self._exchange)

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt], *, keep_on: torch.device | None = None) -> list[EncodedText]:
        """The keys and values of `prompts`, in their order.

        All prompts go through a layer before the next layer is asked for, so each layer is read once. The result
        of each layer is moved to the device `keep_on`; with None it stays where it is computed.
        """
        texts = [self._start(input_ids, position_ids) for input_ids, position_ids in prompts]
        last = self._model.config.num_hidden_layers - 1
        for number, layer in enumerate(self._layers.text()):
            for text in texts:
                found = self._run_text(layer, text, last=number == last)
                text.found.append(found if keep_on is None else found.to(keep_on))
                del found  # frees its device memory before the next prompt needs it
        return [EncodedText(tuple(text.found)) for text in texts]

    def _start(self, input_ids: Tensor, position_ids: Tensor) -> _RunningText:
        rows = even_rows(len(input_ids), self._exchange.ranks)
        start = start_of(rows, self._exchange.rank)
        own = input_ids[start : start + rows[self._exchange.rank]]
        return _RunningText(rows, rotary_of(self._model, position_ids), self._layers.embed(own))

    def _run_text(self, layer: Pathway, text: _RunningText, *, last: bool) -> TextKeyValue:
        """Keys and values of this rank's heads. In the `last` layer only these: nothing reads its other output."""
        head_dim = self._model.config.head_dim
        if last:
            keys = layer.project_keys(text.hidden, head_dim)
            key, value = self._exchange.keys_for_rows(*keys, text.rows, self._heads.shares)
        else:
            heads = layer.project(text.hidden, head_dim)
            query, key, value = self._exchange.heads_for_rows(heads, text.rows, self._heads.shares)
        if layer.key_norm_for_vision is None:
            key = key_for_vision = norm_and_rotate(layer.key_norm, key, text.rotary)
        else:
            normed = normalise(layer.key_norm, key)
            key, key_for_vision = (
                rotated(normed, *text.rotary),
                norm_and_rotate(layer.key_norm_for_vision, normed, text.rotary),
            )
        if not last:
            query = norm_and_rotate(layer.query_norm, query, text.rotary)
            attended = attend(query, key, value, self._heads.own, causal=True)
            text.hidden = layer.finish(text.hidden, self._exchange.rows_for_heads(attended, text.rows))
        # Copies, because a view would keep the whole received message in memory.
        if self._sequence.grid.columns == 1:
            return TextKeyValue(key_for_vision, value.contiguous())
        kept = self._sequence.grid.text(len(key), self._sequence.rank)
        return TextKeyValue(key_for_vision[kept].clone(), value[kept].clone(memory_format=torch.contiguous_format))


@dataclass
class _RunningText:
    """A prompt between two layers: `hidden` [n, hidden] of this rank's tokens; `found` has the layers done."""

    rows: tuple[int, ...]
    rotary: Rotary
    hidden: Tensor
    found: list[TextKeyValue] = field(default_factory=list)


class Texts:
    """Encoded prompts, by their tokens. They are on `device`, or on the host while they wait for a later clip.

    A prompt that several clips share, such as the negative prompt, is encoded once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[tuple[int, ...], EncodedText] = {}
        self._wanted: Counter[tuple[int, ...]] = Counter()

    def encode(self, encoder: TextEncoder, prompts: Sequence[Prompt], *, wait: bool = False) -> None:
        """Encode the missing ones of `prompts` in one pass over the text pathway.

        `wait` says that `prompts` are for later clips; they stay on the host until `take`.
        """
        missing = {key: prompt for key, prompt in ((_key(p), p) for p in prompts) if key not in self._kept}
        if missing:
            where = torch.device("cpu") if wait else self._device
            found = encoder.encode(list(missing.values()), keep_on=where)
            self._kept |= dict(zip(missing, found, strict=True))
        self._wanted.update(key for key in map(_key, prompts) if wait or key in missing)

    def take(self, encoder: TextEncoder, prompts: Sequence[Prompt]) -> list[EncodedText]:
        """The encoded prompts on the device. A prompt that no later clip needs is dropped from this store."""
        if self.lacks(prompts):
            self.encode(encoder, prompts)
        keys = [_key(prompt) for prompt in prompts]
        self._kept |= {key: self._kept[key].to(self._device) for key in keys}  # equal prompts share one copy
        found = [self._kept[key] for key in keys]
        self._wanted.subtract(keys)
        self._kept = {key: text for key, text in self._kept.items() if self._wanted[key] > 0}
        return found

    def lacks(self, prompts: Sequence[Prompt]) -> bool:
        """Whether at least one of `prompts` is not encoded yet."""
        return any(_key(prompt) not in self._kept for prompt in prompts)

    @property
    def nbytes(self) -> int:
        """Bytes of all encoded prompts in this store."""
        return sum(text.nbytes for text in self._kept.values())


def _key(prompt: Prompt) -> tuple[int, ...]:
    return tuple(prompt[0].tolist())
