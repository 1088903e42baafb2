"""The cost of parallel denoising on each rank: arithmetic, text cache, bytes on the wire. Imports no torch.

The costs are exact: tests compare them with counted operations and with the ledgers of real ranks. FLOPs are those
of matrix products; a multiplication and an addition count one each. Causal attention counts as full attention, as
in `FlopCounterMode`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

from cosmos3_pipeline.denoise.guidance import shares_of
from cosmos3_pipeline.denoise.shards import Grid, HeadShare, even_rows, head_shares, level_rows, start_of

TIMESTEP_CHANNELS = 256  # width of the sinusoidal embedding that enters the model's `time_embedder`
COMBINED_BYTES = 4  # the guided velocity is combined in fp32 before the sequence is gathered
SUM_BYTES = 4  # an fp32 log-sum-exp is sent behind each head of a partial attention result


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
    """Payload that a rank sends to others; `far_bytes` leave the node (0 if nodes are not distinguished)."""

    bytes: int = 0
    messages: int = 0
    far_bytes: int = 0

    def __add__(self, other: Wire) -> Wire:
        return Wire(self.bytes + other.bytes, self.messages + other.messages, self.far_bytes + other.far_bytes)

    def __mul__(self, times: int) -> Wire:
        return Wire(self.bytes * times, self.messages * times, self.far_bytes * times)


@dataclass(frozen=True)
class Stretch:
    """The consecutive tokens of one item: a clip, a sound, or actions.

    `channels` is the number of values per token. `clean` are the frames that condition and are not denoised.
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
    """The tokens of one guidance pass: `text` tokens of a prompt, then `stretches` in order."""

    text: int
    stretches: tuple[Stretch, ...]
    negative: bool = False

    @property
    def rows(self) -> int:
        """The number of tokens without the text's."""
        return sum(stretch.tokens for stretch in self.stretches)


@dataclass(frozen=True)
class TextCost:
    """One rank's share of encoding one prompt. A negative prompt that many clips share is encoded once."""

    negative: bool
    tokens: int
    flops: int
    cache_bytes: int
    sequence: Wire


@dataclass(frozen=True)
class PassCost:
    """One rank's share of one guidance pass in one step. `number` is the pass's number in `guidance.Guidance`."""

    number: int
    flops: int
    sequence: Wire


@dataclass(frozen=True)
class StepCost:
    """One rank's share of one or more steps. `passes` is how many passes it computes in them."""

    passes: int
    flops: int
    sequence: Wire
    cfg: Wire


@dataclass(frozen=True)
class DenoiseCost:
    """One rank's share of denoising. `cfg_rank` and `sequence_rank` are its ranks on these two axes.

    `texts` has one entry per prompt; two passes may share a prompt. `passes` has one entry per pass of this rank.
    `clip_flops` (rotary angles of all tokens without the text's) is paid once per clip. `embed_flops` is paid once
    per step, for all passes over the same tokens as the first pass. `velocity` is what one pass sends to the other
    ranks of `cfg`. `gather` is the guided velocity sent to the other ranks of the sequence. It is zero for nested
    passes: each of these gathers its velocity by itself, so the gather counts in its `PassCost`.
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
        """The cost of a step with those of the passes `numbers` that are this rank's own."""
        own = [one for one in self.passes if one.number in numbers]
        return StepCost(
            passes=len(own),
            flops=sum(one.flops for one in own) + (self.embed_flops if own else 0),
            sequence=_sum(one.sequence for one in own) + self.gather,
            # The velocities of all passes are sent in one message.
            cfg=Wire(self.velocity.bytes * len(own), self.velocity.messages if own else 0),
        )

    def steps(self, counted: Mapping[tuple[int, ...], int]) -> StepCost:
        """The cost of all steps of a clip: `counted` maps the passes of a step to how many steps have these."""
        passes, flops, sequence, cfg = 0, 0, Wire(), Wire()
        for numbers, times in counted.items():
            one = self.step(numbers)
            passes += times * one.passes
            flops += times * one.flops
            sequence += one.sequence * times
            cfg += one.cfg * times
        return StepCost(passes, flops, sequence, cfg)


def _node_of(place: int, per_node: int) -> int:
    """The node of a replica's rank. A test tries ranks in other orders."""
    return place // per_node


def denoise_costs(
    model: Dimensions,
    *,
    passes: Sequence[PassTokens],
    cfg: int = 1,
    grid: Grid = ALONE,
    element_bytes: int,
    per_node: int | None = None,
    nested: bool = False,
    on_host: bool,
) -> tuple[DenoiseCost, ...]:
    """The cost of each rank of a replica; the rank in the `grid` varies fastest. Spare ranks repeat one of these.

    `per_node` is the number of ranks on a node. With it, sequence messages that leave the node are counted apart.
    The first rank of a replica must be the first rank of a node.

    `passes` are the guidance passes in diffusers' order; `element_bytes` is the size of the transformer's dtype.
    The layout must pass `check_layout`. With `nested`, passes may have different stretches. Then the velocity of
    each pass is gathered before the passes are combined (see `ParallelTransferDenoiser`). Otherwise the passes are
    combined before the gather. `on_host` says that the ranks compute on a CPU.
    """
    at_most = level_rows(grid.ranks, on_host=on_host)
    shares = head_shares(model.num_attention_heads, model.num_key_value_heads, grid.ulysses) * grid.groups
    owned, costs = shares_of(len(passes), cfg), []
    for cfg_rank, rank in product(range(cfg), range(grid.ranks)):
        own_passes = [(number, passes[number]) for number in owned[cfg_rank]]
        places = range(cfg_rank * grid.ranks, (cfg_rank + 1) * grid.ranks)
        nodes = tuple(_node_of(place, per_node or cfg * grid.ranks) for place in places)
        once = model.num_hidden_layers - 1  # the text's last layer needs only keys and values
        clip_flops, texts, costed = 0, dict[bool, TextCost](), []
        first, embed_flops, predicted, whole = own_passes[0][1].stretches, 0, 0, 0
        for number, one in own_passes:
            rows = even_rows(one.rows, grid.ranks)
            shard = _Shard(model, grid, rows, rank, shares, element_bytes, nodes)
            own = _own_tokens(one.stretches, start_of(rows, rank), shard.own)
            predicted = sum(stretch.noisy(start, stop) * stretch.channels for stretch, start, stop in own)
            whole = sum(stretch.noisy(0, stretch.tokens) * stretch.channels for stretch in one.stretches)
            entering = sum((stop - start) * stretch.channels for stretch, start, stop in own)
            embedding = 2 * model.hidden_size * entering + _noise_level_flops(model, one.stretches, at_most)
            group = Grid(grid.ulysses)
            prompt = _Shard(
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
            angles = 3 * model.head_dim  # FLOPs of one token's rotary embedding
            layer = prompt.project_flops + prompt.finish_flops + prompt.attend_flops(0)
            cache = model.num_hidden_layers * 2 * text * shares[rank].num_keys * model.head_dim
            texts[one.negative] = TextCost(
                negative=one.negative,
                tokens=one.text,
                flops=angles * one.text + prompt.project_keys_flops + once * layer,
                cache_bytes=cache * element_bytes,
                sequence=prompt.keys_to_heads + (prompt.to_heads + prompt.to_rows) * once,
            )
            clip_flops += angles * (shard.asking if grid.groups == 1 else shard.asking + shard.asked)
            layer = shard.project_flops + shard.finish_flops + shard.attend_flops(text)
            flops = model.num_hidden_layers * layer + 2 * model.hidden_size * predicted
            sent = (shard.to_heads + shard.to_rows) * model.num_hidden_layers
            if one.stretches == first:
                embed_flops = embedding
            else:
                flops += embedding
            if nested:
                sent += shard.to_all(predicted * element_bytes)
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
                gather=Wire() if nested else shard.to_all(predicted * COMBINED_BYTES),
            )
        )
    return tuple(costs)


@dataclass(frozen=True)
class _Shard:
    """One rank's shard of a sequence in one layer of its pathway."""

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
        """How many tokens' queries this rank attends with: those of its grid row."""
        return sum(self.rows[rank] for rank in self.grid.row(self.rank))

    @property
    def asked(self) -> int:
        """How many tokens' keys and values this rank attends to: those of its grid column, without the text's."""
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
        """FLOPs of attention; `before` is the number of text tokens that are attended to as well."""
        keys = before + self.asked
        return 4 * self.shares[self.rank].num_queries * self.model.head_dim * self.asking * keys

    @property
    def to_heads(self) -> Wire:
        if self.grid.groups == 1:  # queries, keys and values in one message
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
        """`nbytes` to each other rank of the sequence."""
        return _sum(self._to(peer, nbytes) for peer in range(len(self.rows)) if peer != self.rank)

    def _to(self, peer: int, nbytes: int) -> Wire:
        far = self.nodes[peer] != self.nodes[self.rank]
        return Wire(nbytes, 1 if nbytes else 0, nbytes if far else 0)


def _own_tokens(stretches: Sequence[Stretch], first: int, count: int) -> list[tuple[Stretch, int, int]]:
    """(stretch, start, stop): each stretch's tokens that lie in the sequence's rows [first, first + count)."""
    found, before = [], 0
    for stretch in stretches:
        start, stop = (min(max(edge - before, 0), stretch.tokens) for edge in (first, first + count))
        found.append((stretch, start, stop))
        before += stretch.tokens
    return found


def _noise_level_flops(model: Dimensions, stretches: Sequence[Stretch], at_most: int | None) -> int:
    """FLOPs of embedding a step's noise level: one matrix of `at_most` rows for all tokens.

    A modality with fewer noisy tokens needs a smaller matrix, which is computed in addition.
    """
    noisy: Counter[str] = Counter()
    for stretch in stretches:
        noisy[stretch.modality] += stretch.noisy(0, stretch.tokens)
    rows = {min(tokens, at_most or tokens) for tokens in noisy.values()} - {0}
    return 2 * model.hidden_size * sum(rows) * (TIMESTEP_CHANNELS + model.hidden_size)


def _to_each(nbytes: int, peers: int) -> Wire:
    return Wire(nbytes * peers, peers if nbytes else 0)


def _sum(wires: Iterable[Wire]) -> Wire:
    total = Wire()
    for wire in wires:
        total += wire
    return total
