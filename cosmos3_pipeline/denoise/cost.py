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
from cosmos3_pipeline.denoise.shards import BLOCK_ROWS, Grid, HeadShare, even_rows, head_shares, start_of

TIMESTEP_CHANNELS = 256  # of the sinusoidal embedding that enters the model's `time_embedder`
COMBINED_BYTES = 4  # the guided velocity is combined in fp32 before the sequence is gathered
SUM_BYTES = 4  # of the sum, in fp32, that travels behind each head of a partial result


ALONE = Grid()


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
    """Payload that a rank sends to others, and how much of it leaves the node, where that is told apart."""

    bytes: int = 0
    messages: int = 0
    far_bytes: int = 0

    def __add__(self, other: Wire) -> Wire:
        return Wire(self.bytes + other.bytes, self.messages + other.messages, self.far_bytes + other.far_bytes)

    def __mul__(self, times: int) -> Wire:
        return Wire(self.bytes * times, self.messages * times, self.far_bytes * times)


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
    sequence: Wire


@dataclass(frozen=True)
class PassCost:
    """One rank's share of one guidance pass in one step, by the number of the pass, see `guidance.Guidance`."""

    number: int
    flops: int
    sequence: Wire


@dataclass(frozen=True)
class StepCost:
    """One rank's share of one or more steps, in which it computes so many `passes`."""

    passes: int
    flops: int
    sequence: Wire
    cfg: Wire


@dataclass(frozen=True)
class DenoiseCost:
    """One rank's share, by its place over guidance and sequence.

    `texts` has the prompts of its guidance passes, which two may share, `passes` what each pass costs.
    `clip_flops` (the angles of all tokens but the text's) is once per clip, `embed_flops` once per step for all
    passes over the tokens of the first. `velocity` is one pass's velocity for the other ranks of `cfg`, `gather`
    the guided velocity for those of the sequence; where each pass's is gathered, that is among the pass's own.
    """

    cfg_rank: int
    sequence_rank: int
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
            sequence=_sum(one.sequence for one in own) + self.gather,
            # All of them go in one message.
            cfg=Wire(self.velocity.bytes * len(own), self.velocity.messages if own else 0),
        )

    def steps(self, counted: Mapping[tuple[int, ...], int]) -> StepCost:
        """All steps of a clip: `counted` says how many have which passes."""
        passes, flops, sequence, cfg = 0, 0, Wire(), Wire()
        for numbers, times in counted.items():
            one = self.step(numbers)
            passes += times * one.passes
            flops += times * one.flops
            sequence += one.sequence * times
            cfg += one.cfg * times
        return StepCost(passes, flops, sequence, cfg)

    @property
    def full_step(self) -> StepCost:
        """A step with all passes."""
        return self.step([one.number for one in self.passes])


def denoise_costs(
    model: Dimensions,
    *,
    passes: Sequence[PassTokens],
    cfg: int = 1,
    grid: Grid = ALONE,
    element_bytes: int,
    per_node: int | None = None,
    nested: bool = False,
) -> tuple[DenoiseCost, ...]:
    """The cost of each rank of a replica, those of the `grid` varying fastest; ranks to spare repeat one of these.

    With `per_node` ranks on a node, what a rank sends others of its sequence is told apart by whether it leaves
    the node. A replica begins with a node.

    `passes` are the guidance passes in diffusers' order; `element_bytes` are those of the transformer's dtype. The
    layout must pass `check_layout`. `nested` passes may be over different stretches, and each one's velocity is
    gathered before they are combined (see `ParallelTransferDenoiser`); others are combined first.
    """
    shares = head_shares(model.num_attention_heads, model.num_key_value_heads, grid.ulysses) * grid.groups
    owned, costs = shares_of(len(passes), cfg), []
    for cfg_rank, rank in product(range(cfg), range(grid.ranks)):
        own_passes = [(number, passes[number]) for number in owned[cfg_rank]]
        places = range(cfg_rank * grid.ranks, (cfg_rank + 1) * grid.ranks)
        nodes = tuple(place // (per_node or cfg * grid.ranks) for place in places)
        once = model.num_hidden_layers - 1  # the last layer's text is read by nothing: keys and values suffice
        clip_flops, texts, costed = 0, dict[bool, TextCost](), []
        first, embed_flops, predicted, whole = own_passes[0][1].stretches, 0, 0, 0
        for number, one in own_passes:
            rows = even_rows(one.rows, grid.ranks)
            part = _Part(model, grid, rows, rank, shares, element_bytes, nodes)
            own = _own_tokens(one.stretches, start_of(rows, rank), part.own)
            predicted = sum(stretch.noisy(start, stop) * stretch.channels for stretch, start, stop in own)
            whole = sum(stretch.noisy(0, stretch.tokens) * stretch.channels for stretch in one.stretches)
            projected = sum((stop - start) * stretch.channels for stretch, start, stop in own)
            embedding = 2 * model.hidden_size * projected + _noise_level_flops(model, one.stretches)
            group = Grid(grid.ulysses)
            prompt = _Part(
                model,
                group,
                even_rows(one.text, group.ranks),
                rank % group.ranks,
                shares,
                element_bytes,
                nodes[grid.group(rank).start :],
            )
            kept = grid.text(one.text, rank)
            text = kept.stop - kept.start
            angles = 3 * model.head_dim  # of the rotary embedding, of one token
            layer = prompt.project_flops + prompt.finish_flops + prompt.attend_flops(0)
            cache = model.num_hidden_layers * 2 * text * shares[rank].num_keys * model.head_dim
            texts[one.negative] = TextCost(
                negative=one.negative,
                tokens=one.text,
                flops=angles * one.text + prompt.project_keys_flops + once * layer,
                cache_bytes=cache * element_bytes,
                sequence=prompt.keys_to_heads + (prompt.to_heads + prompt.to_rows) * once,
            )
            clip_flops += angles * (part.asking if grid.groups == 1 else part.asking + part.asked)
            layer = part.project_flops + part.finish_flops + part.attend_flops(text)
            flops = model.num_hidden_layers * layer + 2 * model.hidden_size * projected
            sent = (part.to_heads + part.to_rows) * model.num_hidden_layers
            if one.stretches == first:
                embed_flops = embedding
            else:
                flops += embedding
            if nested:
                sent += part.to_all(predicted * element_bytes)
            costed.append(PassCost(number, flops, sent))
        costs.append(
            DenoiseCost(
                cfg_rank=cfg_rank,
                sequence_rank=rank,
                texts=tuple(texts.values()),
                passes=tuple(costed),
                clip_flops=clip_flops,
                embed_flops=embed_flops,
                velocity=_to_each((whole if nested else predicted) * element_bytes, cfg - 1),
                gather=Wire() if nested else part.to_all(predicted * COMBINED_BYTES),
            )
        )
    return tuple(costs)


@dataclass(frozen=True)
class _Part:
    """One rank's part of a sequence in one layer of its pathway."""

    model: Dimensions
    grid: Grid
    rows: tuple[int, ...]
    rank: int
    shares: Sequence[HeadShare]
    element_bytes: int
    nodes: tuple[int, ...]  # of each rank

    @property
    def own(self) -> int:
        return self.rows[self.rank]

    @property
    def asking(self) -> int:
        """The tokens whose queries it attends with."""
        return sum(self.rows[rank] for rank in self.grid.row(self.rank))

    @property
    def asked(self) -> int:
        """The tokens whose keys and values it attends to, but for those before them."""
        return sum(self.rows[rank] for rank in self.grid.column(self.rank))

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

    def attend_flops(self, before: int) -> int:
        """Attention over `before` tokens of text too."""
        keys = before + self.asked
        return 4 * self.shares[self.rank].num_queries * self.model.head_dim * self.asking * keys

    @property
    def to_heads(self) -> Wire:
        if self.grid.groups == 1:  # all in one message
            return self._of_own_rows(lambda share: share.sent_heads, self.grid.row(self.rank))
        queries = self._of_own_rows(lambda share: share.num_queries, self.grid.row(self.rank))
        return queries + self.keys_to_heads

    @property
    def keys_to_heads(self) -> Wire:
        return self._of_own_rows(lambda share: share.sent_keys, self.grid.column(self.rank))

    @property
    def to_rows(self) -> Wire:
        head = self.model.head_dim * self.element_bytes + (SUM_BYTES if self.grid.columns > 1 else 0)
        width, row = self.shares[self.rank].num_queries * head, self.grid.row(self.rank)
        return _sum(self._to(peer, width * self.rows[peer]) for peer in row if peer != self.rank)

    def _of_own_rows(self, heads: Callable[[HeadShare], int], ranks: Iterable[int]) -> Wire:
        width = self.own * self.model.head_dim * self.element_bytes
        return _sum(self._to(peer, width * heads(self.shares[peer])) for peer in ranks if peer != self.rank)

    def to_all(self, nbytes: int) -> Wire:
        """So much to each other rank."""
        return _sum(self._to(peer, nbytes) for peer in range(len(self.rows)) if peer != self.rank)

    def _to(self, peer: int, nbytes: int) -> Wire:
        far = self.nodes[peer] != self.nodes[self.rank]
        return Wire(nbytes, 1 if nbytes else 0, nbytes if far else 0)


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
