"""Turns an assignment into the actions of each rank. No other module decides on messages. Imports no torch.

    lowered = lower(program, shape, assignment)
    lowered.actions[rank]       # Run, Send, Post, Enter, Recall, ... of that rank, first to last

Three modules read these actions: `execute` (tensors), `account` (bytes, FLOPs, memory) and `clock` (seconds).

Three kinds of values are sent, and only to ranks that need them:

- Between two ops: the activation with its halo, and the tensors of open shortcuts (`Program.carried`).
- Between two chunks: the temporal cache of an op whose next chunk runs on another rank.
- At the end: the finished picture, to rank 0.

All ranks follow one common order: chunk by chunk, portion by portion, op by op. A rank waits for a message only at
a point of this order at which the sender has all of its inputs; this point is `Message.due`. If all ranks keep
their tiles, the margins of an op are a `Halo`. It is sent while the previous op computes the rest of the tile.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

from cosmos3_pipeline.vae.assignment import (
    EVERY,
    Assignment,
    Layout,
    Rect,
    Span,
    Tile,
    layouts,
    read_by,
    whole_picture,
)
from cosmos3_pipeline.vae.ops import WHOLE, LatentShape, Sides
from cosmos3_pipeline.vae.program import Program

# `Message.value` for a temporal cache and for the finished picture. Other values are indices of `Program.carried`:
# 0 is the activation, 1 and more are the shortcuts.
PAST, RESULT = -1, -2

# How many groups of messages a rank may have in flight while it computes, if all chunks are assigned alike. More
# groups take memory and gain nothing.
_IN_FLIGHT = 2
# At least as many if chunks are assigned differently: moving cuts let the previous stage get further ahead.
_IN_FLIGHT_MOVING = 4
# If all chunks of a long clip are assigned alike, only this many are lowered. Later chunks repeat the last of
# them.
_ALIKE = 6
# Clips with fewer chunks are too short for cuts that start early and end late.
_RAMPS_FROM = 8


@dataclass(eq=False, slots=True)
class Message:
    """One tensor from rank `source` to rank `target`: `rect` of value `value` before op `op`.

    rect: in rows and columns of that value.
    part: the portion of the chunk, 0 for an undivided chunk.
    due: the latest point of the common order at which its receive is started. From this point on the sender may
    wait for the message.
    """

    source: int
    target: int
    value: int
    op: int
    rect: Rect
    chunk: int
    part: int
    due: int = 0
    group: int = 0  # messages of one group are waited for together


@dataclass(frozen=True, slots=True)
class Piece:
    """`rect` of value `value`. origin: a message, a tile of this rank, or None for the clip's input."""

    value: int
    rect: Rect
    origin: Message | Tile | None


@dataclass(frozen=True, slots=True)
class Halo:
    """The margins that an op sends and receives for its tile: (rect, rank), in rows and columns of its input."""

    sends: tuple[tuple[Rect, int], ...]
    receives: tuple[tuple[Rect, int], ...]


@dataclass(frozen=True, slots=True)
class Action:
    """One step of a rank. `at` is its point in the common order."""

    at: int


@dataclass(frozen=True, slots=True)
class Post(Action):
    """Start receiving `messages`, each into its own buffer."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Portion(Action):
    """Continue with portion `part` of `parts` of a chunk. Portion 1 divides the chunk."""

    tile: Tile
    part: int
    parts: int


@dataclass(frozen=True, slots=True)
class Enter(Action):
    """Assemble the input of op `op` on `tile`. `fresh`: also the open shortcuts; else the tile has them."""

    tile: Tile
    op: int
    chunk: int
    part: int
    pieces: tuple[Piece, ...]
    fresh: bool


@dataclass(frozen=True, slots=True)
class Recall(Action):
    """Assemble the temporal cache of op `op` on `tile` from frames of the previous chunk."""

    tile: Tile
    op: int
    chunk: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Run(Action):
    """Run the ops [start, stop) on `tile`.

    forgets: ops whose temporal cache this rank does not need again.
    goes_on: op `stop` runs next on this tile.
    """

    tile: Tile
    start: int
    stop: int
    chunk: int
    part: int
    halos: Mapping[int, Halo]
    forgets: frozenset[int]
    goes_on: bool


@dataclass(frozen=True, slots=True)
class Pass(Action):
    """Keep frames for op `op`: another rank runs `op` on this chunk, and this rank runs `op` on a later chunk."""

    tile: Tile
    op: int
    chunk: int
    part: int


@dataclass(frozen=True, slots=True)
class Send(Action):
    """Start sending `messages`, which are taken from `tile`.

    copies: send copies, because the tile stays in use and may be overwritten.
    forgets: this rank does not need the sent frames again.
    """

    tile: Tile
    messages: tuple[Message, ...]
    copies: bool
    forgets: bool = False


@dataclass(frozen=True, slots=True)
class Leave(Action):
    """Free the activation and shortcuts of `tile`."""

    tile: Tile


@dataclass(frozen=True, slots=True)
class Forget(Action):
    """Free the temporal cache of op `op` on `tile`."""

    tile: Tile
    op: int


@dataclass(frozen=True, slots=True)
class Emit(Action):
    """Start assembling the result of one portion. Pieces of other ranks are received directly into the result."""

    chunk: int
    part: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Yield(Action):
    """Wait for the oldest unfinished result, and hand it out."""

    chunk: int
    part: int


@dataclass(frozen=True, slots=True)
class Share(Action):
    """Rank 0 broadcasts all moments of the clip to every rank."""


@dataclass
class Lowered:
    """The actions of each rank for a clip of `shape`, and facts for the modules that read them.

    layouts: the layout of every chunk.
    everywhere: whether each rank computes the whole result.
    in_flight: how many groups of sends a rank may have in flight while it computes.
    """

    program: Program
    shape: LatentShape
    assignment: Assignment
    layouts: tuple[Layout, ...]
    actions: list[list[Action]] = field(default_factory=list)

    @property
    def ranks(self) -> int:
        return self.assignment.ranks

    @cached_property
    def everywhere(self) -> bool:
        return all(tile.rank is EVERY for layout in set(self.layouts) for span in layout for tile in span.tiles)

    @cached_property
    def moves(self) -> bool:
        """Whether the chunks have different layouts."""
        return len(set(self.layouts)) > 1

    @cached_property
    def in_flight(self) -> int:
        if not self.moves or len(self.layouts) < _RAMPS_FROM:
            return _IN_FLIGHT
        # The next rank asks for the temporal caches of a chunk only when it begins the next chunk. If the sender
        # waited for that, ranks that take chunks in turn would compute one after the other.
        sends = (action for own in self.actions for action in own if isinstance(action, Send))
        caches = Counter((m.source, m.chunk) for send in sends for m in send.messages[:1] if m.value == PAST)
        return max([_IN_FLIGHT_MOVING, *caches.values()])

    def ops(self, rank: int) -> list[int]:
        """The ops that `rank` runs on at least one chunk, in order. The rank needs the weights of these ops."""
        return sorted(
            {
                op
                for layout in set(self.layouts)
                for span in layout
                if any(tile.on(rank) for tile in (*span.tiles, *span.warming))
                for op in range(span.start, span.stop)
            }
        )

    @cached_property
    def pairs(self) -> frozenset[tuple[int, int]]:
        """(sender, receiver) of all messages except halos."""
        sends = (action for actions in self.actions for action in actions if isinstance(action, Send))
        return frozenset((message.source, message.target) for send in sends for message in send.messages)

    def portions(self, chunk: int, part: int) -> int:
        """The number of portions of a chunk, of which `part` is one; 1 for an undivided chunk (`part` 0)."""
        return self.program.portions_at(len(self.program), first=chunk == 0) if part else 1

    def message_bytes(self, message: Message) -> int:
        """Payload of a message in bytes, as the ledger counts it. A picture counts as in `decode_stream`."""
        pixels = message.value == RESULT and self.program.direction == "decode"
        return math.prod(self.message_shape(message)) * (
            self.shape.picture_bytes if pixels else self.shape.element_bytes
        )

    def must_wait(self, due: Sequence[int], send: Send) -> bool:
        """Whether a rank with too many messages in flight waits for the first before it executes `send`.

        due: the `Message.due` of the messages in flight. To avoid a deadlock, a rank waits only for a message
        whose receiver needs nothing from this rank that comes with or after `send`.
        """
        return len(due) >= self.in_flight and due[0] < send.at

    def message_shape(self, message: Message) -> tuple[int, int, int, int, int]:
        """[B, T, H, W, C] of a message. This is also the order for a finished picture, whatever its layout."""
        rect = message.rect
        b, t, _, _, c = self.value_shape(message.value, message.op, message.chunk, message.part)
        return b, t, rect.height, rect.width, c

    def value_shape(self, value: int, op: int, chunk: int, part: int) -> tuple[int, int, int, int, int]:
        """[B, T, H, W, C] of a value before op `op` on the whole picture; of one portion in a divided chunk."""
        program, first = self.program, chunk == 0
        if value == PAST:
            return program.kept_shape(op, self.shape)
        b, t, h, w, c = program.carried(op)[max(0, value)].shape(self.shape, first=first)
        return b, t // self.portions(chunk, part), h, w, c

    def value_scale(self, value: int, op: int) -> int:
        """Rows per latent row of a value before op `op`."""
        return self.program.carried(op)[max(0, value)].scale

    def input_rect(self, op: int, tile: Tile) -> tuple[Rect, Rect]:
        """The input rectangle of `op` for `tile`: (without halo, with halo), in rows and columns of the input."""
        known = self._inputs.get((op, tile))
        if known is None:
            spec = self.program.ops[op].source
            core = tile.at(spec.scale)
            known = core, read_by(self.program.ops[op], core, whole_picture(self.shape, spec.scale))
            self._inputs[op, tile] = known
        return known

    def sides(self, tile: Tile) -> Sides:
        """Where the other tiles of its picture lie beside `tile`."""
        if tile not in self._sides:
            self._sides[tile] = self._sides_of(tile)
        return self._sides[tile]

    def _sides_of(self, tile: Tile) -> Sides:
        whole, rect = whole_picture(self.shape, tile.unit), tile.rect
        if rect == whole:
            return WHOLE
        tiles = next(
            span.tiles for layout in set(self.layouts) for span in layout if tile in (*span.tiles, *span.warming)
        )
        return Sides(
            above=rect.top > whole.top,
            below=rect.bottom < whole.bottom,
            left=rect.left > whole.left,
            right=rect.right < whole.right,
            others=len(tiles) - 1,
        )

    @cached_property
    def _sides(self) -> dict[Tile, Sides]:
        return {}

    @cached_property
    def _inputs(self) -> dict[tuple[int, Tile], tuple[Rect, Rect]]:
        return {}


def lower(program: Program, shape: LatentShape, assignment: Assignment) -> Lowered:
    """The actions of every rank. Raises AssignmentError for blocks that are no assignment of the clip."""
    lowered = Lowered(program, shape, assignment, layouts(program, shape, assignment))
    lowered.actions = _Lowering(lowered).actions()
    return lowered


@dataclass(frozen=True)
class Repeated:
    """A clip whose chunks are all assigned alike, represented by two short clips.

    long: a clip with one chunk more than `short`. Each of the `more` chunks that remain adds as much as this last
    chunk. `long` is None if the chunks are assigned differently; then `short` is the clip itself.
    """

    short: Lowered
    long: Lowered | None
    more: int

    def total(self, measure: Callable[[Lowered], float]) -> float:
        """`measure` of the whole clip, for a measure that grows by the same amount with each chunk."""
        found = measure(self.short)
        return found if self.long is None else found + self.more * (measure(self.long) - found)


def lower_repeated(program: Program, shape: LatentShape, assignment: Assignment) -> Repeated:
    """As `lower`, but equal chunks are not lowered again. Raises AssignmentError."""
    chunks = program.chunks(shape)
    alike = all(block.chunks == (0, chunks) and not block.warm_up for block in assignment.blocks)
    if not alike or chunks <= _ALIKE + 1:
        return Repeated(lower(program, shape, assignment), None, 0)

    def clip(count: int) -> Lowered:
        frames = 1 + (count - 1) * program.latents_per_chunk
        blocks = (replace(block, chunks=(0, count)) for block in assignment.blocks)
        return lower(program, replace(shape, frames=frames), replace(assignment, blocks=tuple(blocks)))

    return Repeated(clip(_ALIKE), clip(_ALIKE + 1), chunks - _ALIKE)


class _Lowering:
    """Generates the actions of each rank, in the common order of the clip."""

    def __init__(self, lowered: Lowered) -> None:
        self._low = lowered
        self._program = lowered.program
        self._layouts = lowered.layouts
        self._ranks = range(lowered.ranks)
        self._last = len(lowered.layouts) - 1
        self._spans = [
            {op: span for span in layout for op in range(span.start, span.stop)} for layout in self._layouts
        ]
        self._out: list[list[Action]] = [[] for _ in self._ranks]
        self._sent: dict[tuple[int, int], list[Message]] = defaultdict(list)  # by (source, target)
        self._halo_pairs: set[tuple[int, int]] = set()
        self._halos_known: dict[tuple[int, tuple[Tile, ...]], dict[Tile, dict[int, Halo]]] = {}
        self._halos_without: dict[tuple[int, int], dict[int, Halo]] = {}
        self._late: dict[int, list[tuple[int, Send]]] = defaultdict(list)  # by rank, for the chunk's end
        self._pending: list[tuple[Emit, bool]] = []  # results not handed out yet, and whether their Emit was added
        # Margins are sent as halos, unless ranks also send each other kept frames of the previous chunk. In this
        # case the order of messages between two ranks would differ from the order in which they are received.
        self._halos_allowed = not any(
            any(True for _ in self._fetched(chunk)) for chunk in range(1, self._last + 1) if self._cuts_picture
        )

    @cached_property
    def _cuts_picture(self) -> bool:
        return any(len(span.tiles) > 1 for layout in set(self._layouts) for span in layout)

    def actions(self) -> list[list[Action]]:
        """The actions of every rank."""
        for span in {span for layout in set(self._layouts) for span in layout}:
            if self._halos_as_such(span):
                self._halos(span)
        for chunk in range(self._last + 1):
            self._chunk(chunk)
        end = self._at(self._last + 1, 0, 0)
        self._hand_out(end)
        if self._program.direction == "encode" and not self._low.everywhere and len(self._ranks) > 1:
            for out in self._out:
                out.append(Share(end))
        return [self._posted(rank) for rank in self._ranks]

    def _at(self, chunk: int, part: int, op: int) -> int:
        return (chunk * (self._program.portions + 1) + part) * (len(self._program) + 1) + op

    # ------------------------------------------------------------------------------------------------ one chunk
    def _chunk(self, chunk: int) -> None:
        program, end = self._program, len(self._program)
        early = program.portions_from
        parts = program.portions_at(end, first=chunk == 0)
        stages = [(0, 0, early)] + [(part, early, end) for part in range(1, parts + 1) if early < end]
        layout = self._layouts[chunk]
        for part, start, stop in stages:
            final = part in (0, parts)
            for span in layout:
                a, b = max(span.start, start), min(span.stop, stop)
                if a < b:
                    begins = (a == span.start and part <= 1) or a > start
                    if begins:
                        self._boundary(chunk, part, a)
                    self._run(chunk, part, span, a, b, final=final, recalled=begins)
            if stop == end:
                self._emit(chunk, part)
        for rank in self._ranks:
            for _, send in self._late[rank]:
                self._send(rank, send)
            self._late[rank].clear()

    def _before(self, chunk: int, op: int) -> Span | None:
        """The span whose output op `op` reads; None if the op reads the clip itself."""
        return self._spans[chunk][op - 1] if op else None

    def _boundary(self, chunk: int, part: int, op: int) -> None:
        """Bring the activation from the tiles of the op before `op` to the tiles of `op`."""
        before, after = self._before(chunk, op), self._spans[chunk][op]
        at = self._at(chunk, part, op)
        if part <= 1:  # before `_pass_by` adds to kept frames
            tiles = (*after.tiles, *after.warming)
            self._recalled(
                chunk, [(rank, recall) for _, rank, recall in self._recalls(chunk, part, op, op + 1, tiles)]
            )
        if before is None:
            for tile in (*after.tiles, *after.warming):
                _, reads = self._entered_rects(op, tile)
                for rank in self._of(tile):
                    self._out[rank].append(Enter(at, tile, op, chunk, part, (Piece(0, reads, None),), fresh=True))
            return
        self._pass_by(chunk, part, op)
        going_on = {tile for tile in before.tiles if tile in after.tiles or tile in after.warming}
        going_on |= {tile for tile in before.warming if tile in after.warming}
        # A tile that ends its warm-up drops the results of the warm-up.
        self._leave(at, [tile for tile in before.warming if tile not in going_on])
        self._exchange(chunk, part, op, before, after, frozenset(going_on))
        self._leave(at, [tile for tile in before.tiles if tile not in going_on])

    def _leave(self, at: int, tiles: Iterable[Tile]) -> None:
        for tile in tiles:
            for rank in self._of(tile):
                self._out[rank].append(Leave(at, tile))

    def _exchange(
        self, chunk: int, part: int, op: int, before: Span, after: Span, going_on: frozenset[Tile]
    ) -> None:
        """Send and assemble the input of `op` for every tile that does not have it already."""
        low, at = self._low, self._at(chunk, part, op)
        sends: dict[tuple[int, Tile], list[Message]] = defaultdict(list)
        enters: list[tuple[int, Enter]] = []
        values = range(len(self._program.carried(op)))
        undivided = before is not after and self._splits(op)
        for tile in (*after.tiles, *after.warming):
            core, reads = self._entered_rects(op, tile) if before is not after else low.input_rect(op, tile)
            goes_on = tile in going_on
            if goes_on and core == reads:
                continue
            for rank in self._of(tile):
                pieces: list[Piece] = []
                for value in values[:1] if goes_on else values:
                    scale = low.value_scale(value, op)
                    wanted = reads if value == 0 else tile.at(scale)
                    if goes_on:
                        pieces.append(Piece(value, core, tile))
                    for maker in before.tiles:
                        part_of = maker.at(scale).common(wanted)
                        if part_of is None or (goes_on and maker == tile):
                            continue
                        if maker.on(rank):
                            pieces.append(Piece(value, part_of, maker))
                            continue
                        assert maker.rank is not None
                        message = Message(maker.rank, rank, value, op, part_of, chunk, 0 if undivided else part)
                        sends[maker.rank, maker].append(message)
                        pieces.append(Piece(value, part_of, message))
                if len(pieces) > 1 or not goes_on:
                    enters.append((rank, Enter(at, tile, op, chunk, part, tuple(pieces), fresh=not goes_on)))
        for (rank, tile), messages in sends.items():
            self._send(rank, Send(at, tile, tuple(messages), copies=tile in going_on))
        for rank, enter in enters:
            self._out[rank].append(enter)

    def _run(
        self, chunk: int, part: int, span: Span, start: int, stop: int, *, final: bool, recalled: bool
    ) -> None:
        """Run the ops [start, stop) of one span on all its tiles.

        final: whether this is the last portion of the chunk for these ops.
        recalled: whether the temporal cache of op `start` was assembled already.
        """
        tiles = (*span.tiles, *span.warming)
        parts = self._program.portions_at(len(self._program), first=chunk == 0)
        if self._splits(start) and parts > 1:
            for tile in tiles:
                for rank in self._of(tile):
                    self._out[rank].append(Portion(self._at(chunk, part, start), tile, part, parts))
        halos = self._halos(span) if self._halos_as_such(span) else None
        cuts = {start, stop}
        recalls: dict[int, list[tuple[int, Recall]]] = defaultdict(list)
        if part <= 1:
            for op, rank, recall in self._recalls(chunk, part, start + recalled, stop, tiles):
                recalls[op].append((rank, recall))
        pasts: dict[int, list[tuple[int, Send]]] = defaultdict(list)
        if final and chunk < self._last:
            for op, rank, send in self._handed_on(chunk, part, start, stop):
                pasts[op].append((rank, send))
        cuts |= set(recalls) | {op + 1 for op in pasts}
        if halos is None and len(tiles) > 1:
            cuts |= {op for op in range(start, stop) if self._widens(op)}
        edges = sorted(cuts)
        for a, b in pairwise(edges):
            at = self._at(chunk, part, a)
            if halos is None and len(tiles) > 1 and (a > start or not self._entered(span, a)):
                self._exchange(chunk, part, a, span, span, frozenset(tiles))
            self._recalled(chunk, recalls[a])
            goes_on = b < stop and (halos is not None or len(tiles) == 1 or not self._widens(b))
            for tile in tiles:
                mine = {} if halos is None else halos.get(tile, {})
                if a in mine and self._entered(span, a):
                    mine = self._without(mine, a)
                for rank in self._of(tile):
                    forgets = self._forgets(chunk, a, b, tile, rank) if final else frozenset[int]()
                    self._out[rank].append(Run(at, tile, a, b, chunk, part, mine, forgets, goes_on))
            for rank, send in pasts[b - 1]:
                self._send(rank, send)

    def _entered(self, span: Span, op: int) -> bool:
        """Whether the boundary before op `op` has just assembled its whole input."""
        return op == span.start and not self._splits(op)

    def _splits(self, op: int) -> bool:
        """Whether a chunk is divided into portions before op `op`. Its margins are then sent with each portion."""
        return op == self._program.portions_from < len(self._program)

    def _entered_rects(self, op: int, tile: Tile) -> tuple[Rect, Rect]:
        core, reads = self._low.input_rect(op, tile)
        return core, core if self._splits(op) else reads

    def _without(self, halos: dict[int, Halo], op: int) -> dict[int, Halo]:
        known = self._halos_without.get((id(halos), op))
        if known is None:
            known = self._halos_without[id(halos), op] = {k: halo for k, halo in halos.items() if k != op}
        return known

    def _widens(self, op: int) -> bool:
        return bool(self._program.ops[op].margins) or self._program.ops[op].reads_whole

    def _of(self, tile: Tile) -> Iterable[int]:
        return self._ranks if tile.rank is EVERY else (tile.rank,)

    # ---------------------------------------------------------------------------------------------------- halos
    def _halos_as_such(self, span: Span) -> bool:
        owners = [tile.rank for tile in span.tiles]
        return self._halos_allowed and EVERY not in owners and len(set(owners)) == len(owners) and not span.warming

    def _halos(self, span: Span) -> dict[Tile, dict[int, Halo]]:
        """For each tile, the halo of each of its ops."""
        known = self._halos_known.get((span.start, span.tiles))
        if known is not None:
            return known
        found: dict[Tile, dict[int, Halo]] = {tile: {} for tile in span.tiles}
        if len(span.tiles) > 1:
            by_kind: dict[object, list[Halo]] = {}
            for op in range(span.start, span.stop):
                if not self._widens(op):
                    continue
                source = self._program.ops[op]
                kind = (source.source.scale, source.margins, source.reads_whole)
                if kind not in by_kind:
                    by_kind[kind] = self._halos_of(op, span.tiles)
                for tile, halo in zip(span.tiles, by_kind[kind], strict=True):
                    if halo.sends or halo.receives:
                        found[tile][op] = halo
        self._halos_known[span.start, span.tiles] = found
        return found

    def _halos_of(self, op: int, tiles: Sequence[Tile]) -> list[Halo]:
        rects = [self._low.input_rect(op, tile) for tile in tiles]
        sends: list[list[tuple[Rect, int]]] = [[] for _ in tiles]
        receives: list[list[tuple[Rect, int]]] = [[] for _ in tiles]
        for i, (_, reads) in enumerate(rects):
            for j, (core, _) in enumerate(rects):
                piece = reads.common(core) if i != j else None
                if piece is not None:
                    source, target = tiles[j].rank, tiles[i].rank
                    assert source is not None and target is not None
                    receives[i].append((piece, source))
                    sends[j].append((piece, target))
                    self._halo_pairs |= {(source, target), (target, source)}
        return [Halo(tuple(a), tuple(b)) for a, b in zip(sends, receives, strict=True)]

    # --------------------------------------------------------------------------------------------- temporal caches
    def _ran(self, chunk: int, op: int, tile: Tile) -> bool:
        span = self._spans[chunk][op]
        return tile in span.tiles or tile in span.warming

    def _saw(self, chunk: int, op: int, tile: Tile) -> bool:
        """Whether the rank of `tile` computed the whole input of `op` on `tile`, but did not run `op`."""
        core, reads = self._low.input_rect(op, tile)
        return (
            op > 0
            and core == reads
            and not self._ran(chunk, op, tile)
            and tile in self._spans[chunk][op - 1].tiles
        )

    def _seen_since(self, chunk: int, op: int, tile: Tile) -> int | None:
        """The first past chunk that `op` needs for `chunk`, if this rank saw the input from it on; else None."""
        spec, seen = self._program.ops[op], 0
        for before in range(chunk - 1, -1, -1):
            if not self._saw(before, op, tile):
                # This rank ran the op itself on chunk `before`, and still has its temporal cache.
                return before + 1 if seen and self._ran(before, op, tile) else None
            seen += spec.source.frames if before else 1
            if seen >= spec.cached_frames:
                return before
        return 0 if seen else None

    def _kept_here(self, chunk: int, op: int, tile: Tile) -> bool:
        """Whether `tile`, which runs `op` on `chunk`, already has the temporal cache for it."""
        return self._ran(chunk - 1, op, tile) or self._seen_since(chunk, op, tile) is not None

    def _nothing_kept(self, chunk: int, op: int, tile: Tile) -> bool:
        """Whether `op` needs no kept frames for `chunk`: at the clip's start, or at the start of a warm-up."""
        if chunk == 0 or not self._program.ops[op].keeps(first=chunk == 1):
            return True
        return tile in self._spans[chunk][op].warming and not self._ran(chunk - 1, op, tile)

    def _fetched(self, chunk: int) -> Iterator[tuple[int, Tile]]:
        """(op, tile) for each temporal cache of the previous chunk that must be fetched from other tiles."""
        if self._layouts[chunk] is self._layouts[chunk - 1]:
            return
        for op in self._program.keeping(0, len(self._program)):
            span = self._spans[chunk][op]
            for tile in (*span.tiles, *span.warming):
                if not self._nothing_kept(chunk, op, tile) and not self._kept_here(chunk, op, tile):
                    yield op, tile

    @cached_property
    def _moved(self) -> list[dict[int, list[tuple[int, Tile, tuple[Piece, ...]]]]]:
        """For each chunk, by op: (rank, tile, pieces) of the temporal caches that must be assembled."""
        found: list[dict[int, list[tuple[int, Tile, tuple[Piece, ...]]]]] = []
        for chunk in range(self._last + 1):
            by_op: dict[int, list[tuple[int, Tile, tuple[Piece, ...]]]] = defaultdict(list)
            for op, tile in self._fetched(chunk) if chunk else ():
                scale = self._program.ops[op].source.scale
                _, reads = self._low.input_rect(op, tile)
                for rank in self._of(tile):
                    pieces = []
                    for maker in self._spans[chunk - 1][op].tiles:
                        rect = maker.at(scale).common(reads)
                        if rect is None:
                            continue
                        origin: Message | Tile = maker
                        if not maker.on(rank):
                            assert maker.rank is not None
                            origin = Message(maker.rank, rank, PAST, op, rect, chunk - 1, 0)
                        pieces.append(Piece(PAST, rect, origin))
                    by_op[op].append((rank, tile, tuple(pieces)))
            found.append(by_op)
        return found

    def _recalls(
        self, chunk: int, part: int, start: int, stop: int, tiles: Sequence[Tile]
    ) -> Iterator[tuple[int, int, Recall]]:
        for op, moved in self._moved[chunk].items():
            if start <= op < stop:
                for rank, tile, pieces in moved:
                    if tile in tiles:
                        yield op, rank, Recall(self._at(chunk, part, op), tile, op, chunk, pieces)

    def _recalled(self, chunk: int, recalls: Sequence[tuple[int, Recall]]) -> None:
        for rank, recall in recalls:
            self._out[rank].append(recall)
        for rank, recall in recalls:
            for piece in recall.pieces:
                origin = piece.origin
                if (
                    isinstance(origin, Tile)
                    and not self._ran(chunk, recall.op, origin)
                    and not self._adds_to_kept(chunk, recall.op, origin)
                ):
                    self._out[rank].append(Forget(recall.at, origin, recall.op))

    def _handed_on(self, chunk: int, part: int, start: int, stop: int) -> Iterator[tuple[int, int, Send]]:
        """The sends of temporal caches to other ranks for the next chunk, as soon as an op has kept its frames.

        A send waits until the end of the chunk if activations of this chunk follow to the same rank, because that
        rank receives these activations first.
        """
        for op, moved in self._moved[chunk + 1].items():
            if not start <= op < stop:
                continue
            by_maker: dict[Tile, list[Message]] = defaultdict(list)
            for _, _, pieces in moved:
                for piece in pieces:
                    if isinstance(piece.origin, Message):
                        maker = next(t for t in self._spans[chunk][op].tiles if self._has_made(t, piece.origin))
                        by_maker[maker].append(piece.origin)
            for maker, messages in by_maker.items():
                assert maker.rank is not None
                stays = self._needed_here(chunk, op, maker, maker.rank)
                send = Send(self._at(chunk, part, op), maker, tuple(messages), copies=stays, forgets=not stays)
                if any(self._meets(chunk, op, maker.rank, message.target) for message in messages):
                    self._late[maker.rank].append((op, send))
                else:
                    yield op, maker.rank, send

    def _has_made(self, tile: Tile, past: Message) -> bool:
        """Whether a message with a temporal cache comes from `tile`. A rank may have several tiles."""
        scale = self._program.ops[past.op].source.scale
        return tile.rank == past.source and tile.at(scale).common(past.rect) is not None

    def _meets(self, chunk: int, op: int, source: int, target: int) -> bool:
        """Whether an activation is sent from `source` to `target` after op `op` of this chunk."""
        layout = self._layouts[chunk]
        return any(
            span.start > op
            and any(tile.on(source) for tile in before.tiles)
            and any(tile.on(target) and not tile.on(source) for tile in span.tiles)
            for before, span in pairwise(layout)
        )

    def _needed_here(self, chunk: int, op: int, tile: Tile, rank: int) -> bool:
        """Whether `rank` needs the frames that `op` kept on `tile` again after `chunk`."""
        following = chunk + 1
        if following > self._last:
            return False
        if self._ran(following, op, tile) and not self._nothing_kept(following, op, tile):
            return True
        return self._adds_to_kept(following, op, tile) or any(
            piece.origin == tile
            for taker, _, pieces in self._moved[following].get(op, ())
            if taker == rank
            for piece in pieces
        )

    def _adds_to_kept(self, chunk: int, op: int, tile: Tile) -> bool:
        """Whether another rank runs `op` on `chunk`, while this rank adds to its kept frames for a later chunk."""
        later = self._passes_for(chunk, op, tile)
        if later is None or self._seen_since(later, op, tile) != chunk:
            return False
        bound = self._program.ops[op]
        return (later - chunk) * bound.source.frames < bound.cached_frames

    def _passes_for(self, chunk: int, op: int, tile: Tile) -> int | None:
        """The later chunk for which `tile` will run `op` with the input that it sees on `chunk`; None if none."""
        if not self._saw(chunk, op, tile):
            return None
        for later in range(chunk + 1, min(self._last, chunk + self._program.chunks_kept(op)) + 1):
            if self._ran(later, op, tile):
                since = self._seen_since(later, op, tile)
                return later if since is not None and since <= chunk else None
            if not self._saw(later, op, tile):
                return None
        return None

    def _pass_by(self, chunk: int, part: int, op: int) -> None:
        if not self._program.ops[op].cached_frames or not self._low.moves:
            return
        if not self._program.ops[op].keeps(first=chunk == 0):
            return
        for tile in self._spans[chunk][op - 1].tiles:
            if self._passes_for(chunk, op, tile) is not None:
                for rank in self._of(tile):
                    self._out[rank].append(Pass(self._at(chunk, part, op), tile, op, chunk, part))

    def _forgets(self, chunk: int, start: int, stop: int, tile: Tile, rank: int) -> frozenset[int]:
        keeping = self._program.keeping(start, stop)
        if chunk == self._last:
            return frozenset(keeping)
        if self._layouts[chunk] is self._layouts[chunk + 1]:
            return frozenset()
        sent = {
            op
            for op in keeping
            for _, _, pieces in self._moved[chunk + 1].get(op, ())
            for p in pieces
            if isinstance(p.origin, Message) and self._has_made(tile, p.origin)
        }
        return frozenset(op for op in keeping if op not in sent and not self._needed_here(chunk, op, tile, rank))

    # ----------------------------------------------------------------------------------------- the finished result
    def _emit(self, chunk: int, part: int) -> None:
        end = len(self._program)
        at = self._at(chunk, part, end)
        tiles = self._spans[chunk][end - 1].tiles
        scale = self._program.ops[-1].target.scale
        if self._low.everywhere:
            for out in self._out:
                pieces = tuple(Piece(RESULT, tile.at(scale), tile) for tile in tiles)
                out.append(Emit(at, chunk, part, pieces))
            due = self._out
        else:
            found: list[Piece] = []
            for tile in tiles:
                if tile.on(0):
                    found.append(Piece(RESULT, tile.at(scale), tile))
                    continue
                assert tile.rank is not None
                message = Message(tile.rank, 0, RESULT, end, tile.at(scale), chunk, part)
                found.append(Piece(RESULT, tile.at(scale), message))
                self._send(tile.rank, Send(at, tile, (message,), copies=False))
            due = self._out[:1] if self._result(Emit(at, chunk, part, tuple(found))) else []
        self._leave(at, (*tiles, *self._spans[chunk][end - 1].warming))
        for out in due:
            out.append(Yield(at, chunk, part))

    def _result(self, emit: Emit) -> bool:
        """Add the assembly of a result on rank 0. Returns whether rank 0 has all pieces and can hand it out now.

        Otherwise pieces of other ranks stay in flight while the next result is computed.
        """
        local = [isinstance(piece.origin, Tile) for piece in emit.pieces]
        sources = [piece.origin.source for piece in emit.pieces if isinstance(piece.origin, Message)]
        if any(local):
            self._hand_out(emit.at)
        # Rank 0 receives the results of other ranks after its own next result, or when too many of them wait. From
        # ranks with which it exchanges halos it receives at once, because messages must be received in send order.
        begun = any(local) or any((source, 0) in self._halo_pairs for source in sources)
        if begun:
            self._out[0].append(emit)
        if all(local):
            return True
        self._pending.append((emit, begun))
        if len(self._pending) > len(self._ranks):
            self._hand_out(emit.at, leave=len(self._ranks))
        return False

    def _hand_out(self, at: int, leave: int = 0) -> None:
        out = self._out[0]
        while len(self._pending) > leave:
            emit, begun = self._pending.pop(0)
            if not begun:
                out.append(replace(emit, at=at))
            out.append(Yield(at, emit.chunk, emit.part))

    # ------------------------------------------------------------------------------------------------- messages
    def _send(self, rank: int, send: Send) -> None:
        self._out[rank].append(send)
        for message in send.messages:
            self._sent[message.source, message.target].append(message)

    def _posted(self, rank: int) -> list[Action]:
        """The actions of `rank`, with a `Post` for each message that it receives, in the order of its sender.

        Posts come early, so that the messages for the next `Enter` are in flight while the current ops run.
        """
        actions = self._out[rank]
        post_at: dict[int, int] = {}
        entered = 0
        for index, action in enumerate(actions):
            if not isinstance(action, Enter | Recall | Emit):
                continue
            messages = [piece.origin for piece in action.pieces if isinstance(piece.origin, Message)]
            place = index
            if isinstance(action, Enter) and messages:
                if not any((message.source, rank) in self._halo_pairs for message in messages):
                    place = entered
                entered = index + 1
            for message in messages:
                post_at[id(message)] = place
                message.group = index
        posts: dict[int, list[Message]] = defaultdict(list)
        for (_, target), messages in self._sent.items():
            if target != rank:
                continue
            earliest = len(actions)
            placed: list[tuple[int, Message]] = []
            for message in reversed(messages):
                earliest = min(earliest, post_at[id(message)])
                placed.append((earliest, message))
                message.due = actions[earliest].at
            for place, message in reversed(placed):
                posts[place].append(message)
        out: list[Action] = []
        for index, action in enumerate(actions):
            # A result is received directly into its place, unless other messages are posted at the same time.
            if any(message.value != RESULT or message.group != index for message in posts.get(index, ())):
                out.append(Post(action.at, tuple(posts[index])))
            out.append(action)
        return out
