"""What parallel denoising costs each rank: arithmetic, text cache, bytes on the wire. Imports no torch.

Exact: tests hold it against counted operations and against the ledgers of real ranks. FLOPs are those of the
matrix products, a multiplication and an addition each counted; attention counts whole, as `FlopCounterMode`
counts it, also where it is causal. Not counted: one rank alone on a CPU with several threads embeds the timestep
for every noisy token instead of once (see `ParallelTransformer.embed`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

from cosmos3_pipeline.denoise.guidance import shares_of
from cosmos3_pipeline.denoise.shards import BLOCK_ROWS, HeadShare, even_rows, head_shares, start_of

TIMESTEP_CHANNELS = 256  # of the sinusoidal embedding that enters the model's `time_embedder`
COMBINED_BYTES = 4  # the guided velocity is combined in fp32 before the sequence is gathered


class Dimensions(Protocol):
    """The dimensions of a `Cosmos3OmniTransformer` that decide its work."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate (`silu`), or two matrices only (`relu2`)."""


@dataclass(frozen=True)
class Wire:
    """Payload that a rank sends to others."""

    bytes: int = 0
    messages: int = 0

    def __add__(self, other: Wire) -> Wire:
        return Wire(self.bytes + other.bytes, self.messages + other.messages)

    def __mul__(self, times: int) -> Wire:
        return Wire(self.bytes * times, self.messages * times)


@dataclass(frozen=True)
class Stretch:
    """Tokens of one item that stand one after the other: a clip, a sound, or actions.

    `channels` are the values of a token, `clean` the frames that condition and are not denoised.
    """

    modality: str  # vision, sound or action
    channels: int
    frames: int
    tokens_per_frame: int = 1
    clean: frozenset[int] = frozenset()

    @property
    def tokens(self) -> int:
        return self.frames * self.tokens_per_frame

    def noisy(self, start: int, stop: int) -> int:
        """How many of the tokens from `start` to `stop` are denoised."""
        per, found = self.tokens_per_frame, 0
        for frame in range(self.frames):
            if frame not in self.clean:
                found += max(min(stop, (frame + 1) * per) - max(start, frame * per), 0)
        return found


@dataclass(frozen=True)
class PassTokens:
    """What one guidance pass goes over: `text` tokens of a prompt, then `stretches`, in their order."""

    text: int
    stretches: tuple[Stretch, ...]
    negative: bool = False

    @property
    def rows(self) -> int:
        """All tokens but the text's."""
        return sum(stretch.tokens for stretch in self.stretches)


@dataclass(frozen=True)
class TextCost:
    """One rank's share of encoding one prompt; the negative prompt of many clips is encoded once."""

    negative: bool
    tokens: int
    flops: int
    cache_bytes: int
    ulysses: Wire


@dataclass(frozen=True)
class PassCost:
    """One rank's share of one guidance pass in one step, by the number of the pass, see `guidance.Guidance`."""

    number: int
    flops: int
    ulysses: Wire


@dataclass(frozen=True)
class StepCost:
    """One rank's share of one or more steps, in which it computes so many `passes`."""

    passes: int
    flops: int
    ulysses: Wire
    cfg: Wire


@dataclass(frozen=True)
class DenoiseCost:
    """One rank's share, by its place on the two axes.

    `texts` has the prompts of its guidance passes, which two may share, `passes` what each pass costs.
    `clip_flops` (the angles of all tokens but the text's) is once per clip, `embed_flops` once per step for all
    passes over the tokens of the first. `velocity` is one pass's velocity for the other ranks of `cfg`, `gather`
    the guided velocity for those of `ulysses`; where each pass's is gathered, that is among the pass's own.
    """

    cfg_rank: int
    ulysses_rank: int
    texts: tuple[TextCost, ...]
    passes: tuple[PassCost, ...]
    clip_flops: int
    embed_flops: int
    velocity: Wire
    gather: Wire

    def step(self, numbers: Collection[int]) -> StepCost:
        """A step that has the passes `numbers`."""
        own = [one for one in self.passes if one.number in numbers]
        return StepCost(
            passes=len(own),
            flops=sum(one.flops for one in own) + (self.embed_flops if own else 0),
            ulysses=_sum(one.ulysses for one in own) + self.gather,
            # All of them go in one message.
            cfg=Wire(self.velocity.bytes * len(own), self.velocity.messages if own else 0),
        )

    def steps(self, counted: Mapping[tuple[int, ...], int]) -> StepCost:
        """All steps of a clip: `counted` says how many have which passes."""
        passes, flops, ulysses, cfg = 0, 0, Wire(), Wire()
        for numbers, times in counted.items():
            one = self.step(numbers)
            passes += times * one.passes
            flops += times * one.flops
            ulysses += one.ulysses * times
            cfg += one.cfg * times
        return StepCost(passes, flops, ulysses, cfg)

    @property
    def full_step(self) -> StepCost:
        """A step with all passes."""
        return self.step([one.number for one in self.passes])


def denoise_costs(
    model: Dimensions,
    *,
    passes: Sequence[PassTokens],
    cfg: int = 1,
    ulysses: int = 1,
    element_bytes: int,
    nested: bool = False,
) -> tuple[DenoiseCost, ...]:
    """The cost of each rank of a replica, `ulysses` varying fastest; ranks to spare repeat one of these.

    `passes` are the guidance passes in diffusers' order; `element_bytes` are those of the transformer's dtype. The
    layout must pass `check_layout`. `nested` passes may be over different stretches, and each one's velocity is
    gathered before they are combined (see `ParallelTransferDenoiser`); others are combined first.
    """
    shares = head_shares(model.num_attention_heads, model.num_key_value_heads, ulysses)
    owned, costs = shares_of(len(passes), cfg), []
    for cfg_rank, rank in product(range(cfg), range(ulysses)):
        own_passes = [(number, passes[number]) for number in owned[cfg_rank]]
        once = model.num_hidden_layers - 1  # the last layer's text is read by nothing: keys and values suffice
        clip_flops, texts, costed = 0, dict[bool, TextCost](), []
        first, embed_flops, predicted, whole = own_passes[0][1].stretches, 0, 0, 0
        for number, one in own_passes:
            rows = even_rows(one.rows, ulysses)
            part = _Part(model, rows, rank, shares, element_bytes)
            own = _own_tokens(one.stretches, start_of(rows, rank), part.own)
            predicted = sum(stretch.noisy(start, stop) * stretch.channels for stretch, start, stop in own)
            whole = sum(stretch.noisy(0, stretch.tokens) * stretch.channels for stretch in one.stretches)
            projected = sum((stop - start) * stretch.channels for stretch, start, stop in own)
            embedding = 2 * model.hidden_size * projected + _noise_level_flops(model, one.stretches)
            prompt = _Part(model, even_rows(one.text, ulysses), rank, shares, element_bytes)
            angles = 3 * model.head_dim  # of the rotary embedding, of one token
            layer = prompt.project_flops + prompt.finish_flops + prompt.attend_flops(prompt.total)
            cache = model.num_hidden_layers * 2 * prompt.total * shares[rank].num_keys * model.head_dim
            texts[one.negative] = TextCost(
                negative=one.negative,
                tokens=one.text,
                flops=angles * prompt.total + prompt.project_keys_flops + once * layer,
                cache_bytes=cache * element_bytes,
                ulysses=prompt.keys_to_heads + (prompt.to_heads + prompt.to_rows) * once,
            )
            clip_flops += angles * part.total
            layer = part.project_flops + part.finish_flops + part.attend_flops(prompt.total + part.total)
            flops = model.num_hidden_layers * layer + 2 * model.hidden_size * projected
            sent = (part.to_heads + part.to_rows) * model.num_hidden_layers
            if one.stretches == first:
                embed_flops = embedding
            else:
                flops += embedding
            if nested:
                sent += _to_each(predicted * element_bytes, ulysses - 1)
            costed.append(PassCost(number, flops, sent))
        costs.append(
            DenoiseCost(
                cfg_rank=cfg_rank,
                ulysses_rank=rank,
                texts=tuple(texts.values()),
                passes=tuple(costed),
                clip_flops=clip_flops,
                embed_flops=embed_flops,
                velocity=_to_each((whole if nested else predicted) * element_bytes, cfg - 1),
                gather=Wire() if nested else _to_each(predicted * COMBINED_BYTES, ulysses - 1),
            )
        )
    return tuple(costs)


@dataclass(frozen=True)
class _Part:
    """One rank's part of a sequence in one layer of its pathway."""

    model: Dimensions
    rows: tuple[int, ...]
    rank: int
    shares: Sequence[HeadShare]
    element_bytes: int

    @property
    def own(self) -> int:
        return self.rows[self.rank]

    @property
    def total(self) -> int:
        return sum(self.rows)

    @property
    def project_flops(self) -> int:
        queries = 2 * self.own * self.model.hidden_size * self.model.num_attention_heads * self.model.head_dim
        return queries + self.project_keys_flops

    @property
    def project_keys_flops(self) -> int:
        return 2 * self.own * self.model.hidden_size * 2 * self.model.num_key_value_heads * self.model.head_dim

    @property
    def finish_flops(self) -> int:
        attention = self.model.num_attention_heads * self.model.head_dim
        mlp = (3 if self.model.gated else 2) * self.model.intermediate_size
        return 2 * self.own * self.model.hidden_size * (attention + mlp)

    def attend_flops(self, keys: int) -> int:
        return 4 * self.shares[self.rank].num_queries * self.model.head_dim * self.total * keys

    @property
    def to_heads(self) -> Wire:
        return self._of_own_rows(lambda share: share.sent_heads)

    @property
    def keys_to_heads(self) -> Wire:
        return self._of_own_rows(lambda share: share.sent_keys)

    @property
    def to_rows(self) -> Wire:
        width = self.shares[self.rank].num_queries * self.model.head_dim * self.element_bytes
        return _sum(_to_each(width * self.rows[peer], 1) for peer in self._peers)

    def _of_own_rows(self, heads: Callable[[HeadShare], int]) -> Wire:
        width = self.own * self.model.head_dim * self.element_bytes
        return _sum(_to_each(width * heads(self.shares[peer]), 1) for peer in self._peers)

    @property
    def _peers(self) -> list[int]:
        return [peer for peer in range(len(self.rows)) if peer != self.rank]


def _own_tokens(stretches: Sequence[Stretch], first: int, count: int) -> list[tuple[Stretch, int, int]]:
    """Which tokens of each stretch are among the `count` of the sequence from `first` on."""
    found, before = [], 0
    for stretch in stretches:
        start, stop = (min(max(edge - before, 0), stretch.tokens) for edge in (first, first + count))
        found.append((stretch, start, stop))
        before += stretch.tokens
    return found


def _noise_level_flops(model: Dimensions, stretches: Sequence[Stretch]) -> int:
    """Embedding a step's noise level: a small matrix, which serves all tokens, of some rows.

    Modalities with so few noisy tokens that they take fewer rows have one of their own.
    """
    noisy: Counter[str] = Counter()
    for stretch in stretches:
        noisy[stretch.modality] += stretch.noisy(0, stretch.tokens)
    rows = {min(tokens, BLOCK_ROWS) for tokens in noisy.values()} - {0}
    return 2 * model.hidden_size * sum(rows) * (TIMESTEP_CHANNELS + model.hidden_size)


def _to_each(nbytes: int, peers: int) -> Wire:
    return Wire(nbytes * peers, peers if nbytes else 0)


def _sum(wires: Iterable[Wire]) -> Wire:
    total = Wire()
    for wire in wires:
        total += wire
    return total
