"""Adds up the actions of each rank: bytes and messages, FLOPs, weights, peak memory. Imports no torch.

It simulates `execute` with sizes instead of tensors.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from cosmos3_pipeline.vae.assignment import Rect, Tile
from cosmos3_pipeline.vae.lowering import (
    RESULT,
    Action,
    Emit,
    Enter,
    Forget,
    Leave,
    Lowered,
    Message,
    Pass,
    Portion,
    Post,
    Recall,
    Repeated,
    Run,
    Send,
    Share,
    Yield,
)
from cosmos3_pipeline.vae.ops import NO_ROOM, Room, Work


@dataclass
class Tally:
    """The work of one rank for one clip.

    flops: as `Op.flops` and `Op.dropped_flops`.
    sent_bytes, sent_messages: the payload that the rank sends, as the ledger counts it. A decode counts the
    pictures of `decode_stream`, one byte per value.
    folded_bytes: what folded kernels take beyond `weight_bytes`.
    peak_bytes: the most bytes of tensors alive at once, without weights and buffers of the convolution library.
    """

    flops: int = 0
    sent_bytes: int = 0
    sent_messages: int = 0
    weight_bytes: int = 0
    folded_bytes: int = 0
    peak_bytes: int = 0


def account_repeated(clip: Repeated) -> list[Tally]:
    """The tally of every rank for a clip in which equal chunks were lowered only once."""
    short = account(clip.short)
    if clip.long is None:
        return short
    tallies = []
    for a, b in zip(short, account(clip.long), strict=True):
        grown = {
            name: getattr(a, name) + clip.more * (getattr(b, name) - getattr(a, name))
            for name in ("flops", "sent_bytes", "sent_messages")
        }
        tallies.append(replace(a, peak_bytes=max(a.peak_bytes, b.peak_bytes), **grown))
    return tallies


def account(lowered: Lowered) -> list[Tally]:
    """The tally of every rank."""
    runs = Runs(lowered)
    if lowered.everywhere:
        alone = Walk(lowered, 0, runs).tally()
        return [replace(alone) for _ in range(lowered.ranks)]
    return [Walk(lowered, rank, runs).tally() for rank in range(lowered.ranks)]


class _Flow:
    """Sizes in elements of a portion between two ops: the activation with its room, and the open shortcuts.

    Each size is in a list of length 1, which stands for a tensor: an identity shortcut and the activation are the
    same list, because they share memory.
    """

    def __init__(self, at: list[int], shortcuts: list[list[int]], room: Room = NO_ROOM) -> None:
        self.at = at
        self.shortcuts = shortcuts
        self.room = room

    def tensors(self) -> dict[int, int]:
        return {id(tensor): tensor[0] for tensor in (self.at, *self.shortcuts)}

    @property
    def elements(self) -> int:
        return sum(self.tensors().values())

    def pattern(self) -> tuple[tuple[int, int], ...]:
        """(tensor number, elements) of the activation and each shortcut; equal for flows of the same form."""
        order: dict[int, int] = {}
        return tuple((order.setdefault(id(t), len(order)), t[0]) for t in (self.at, *self.shortcuts))

    def become(self, pattern: tuple[tuple[int, int], ...], room: Room) -> None:
        """Take the form of a flow with this pattern and room."""
        tensors: dict[int, list[int]] = {}
        self.at, *self.shortcuts = (tensors.setdefault(which, [elements]) for which, elements in pattern)
        self.room = room


class _After(NamedTuple):
    """The flow after a run of ops, and the peak bytes of the flow and the kept frames during the run."""

    pattern: tuple[tuple[int, int], ...]
    room: Room
    kept: Mapping[int, int]
    peak_bytes: int
    flops: int


class Runs:
    """Simulates runs of ops on tiles. Equal runs are simulated once, for all ranks and chunks."""

    def __init__(self, lowered: Lowered) -> None:
        self._low = lowered
        self._program = lowered.program
        self._element = lowered.shape.element_bytes
        self._work: dict[tuple[Rect, int, bool, int], Work] = {}
        self._known: dict[Any, _After] = {}

    def work_of(self, tile: Tile, chunk: int, portions: int) -> Work:
        """The size of the work of one portion of a chunk on `tile`."""
        key = (tile.rect, tile.unit, chunk == 0, portions)
        if key not in self._work:
            self._work[key] = Work(tile.latent(self._low.shape), self._low.shape, chunk == 0, portions)
        return self._work[key]

    def after(self, run: Run, flow: _Flow, kept: Mapping[int, int], work: Work) -> _After:
        """The flow after `run`, which begins with `flow` while the frames `kept` by its ops are alive."""
        key = (run.start, run.stop, run.forgets, run.goes_on, work, flow.pattern(), flow.room, tuple(kept))
        if key not in self._known:
            walked = _Flow([0], [])
            walked.become(flow.pattern(), flow.room)
            frames, peak = dict(kept), 0
            for number in range(run.start, run.stop):
                following = number + 1 if number + 1 < run.stop or run.goes_on else None
                peak = max(peak, self._op(walked, frames, number, following, work, forgets=number in run.forgets))
            whole = work.whole if work.cut_rows or work.cut_cols else None
            ops = self._program.ops[run.start : run.stop]
            flops = sum(op.flops(work.latent, first=work.first, whole=whole) for op in ops)
            flops += sum(op.dropped_flops(work.latent, first=work.first) for op in ops)
            self._known[key] = _After(walked.pattern(), walked.room, frames, peak, flops // work.portions)
        return self._known[key]

    def _op(
        self, flow: _Flow, kept: dict[int, int], number: int, following: int | None, work: Work, *, forgets: bool
    ) -> int:
        """Run one op on `flow`; returns the peak bytes of the flow and of the kept frames together."""
        op, peak = self._program.ops[number], 0
        passes = op.passes(first=work.first)
        alive = flow.tensors()
        if op.takes_room and not (passes and not op.keeps(first=work.first)):
            wanted = self.room(number, work)
            if flow.room != wanted:
                taken = [work.elements(op.source, wanted)]
                peak = sum(alive.values()) + taken[0] + sum(kept.values())
                flow.at, flow.room = taken, wanted
        if op.keeps(first=work.first) and not forgets:
            kept[number] = self.kept_elements(number, work)
        closed = flow.shortcuts.pop() if op.closes else None
        alive = {id(t): t[0] for t in (flow.at, *flow.shortcuts, *([closed] if closed else []))}
        scratch = op.scratch_bytes(work)
        if passes:
            out, room, scratch = flow.at, flow.room, 0
        elif op.leaves_room:
            room = NO_ROOM if following is None else self.room(following, work)
            out = [work.elements(op.target, room)]
        elif op.opens is not None:
            flow.shortcuts.append([work.elements(op.opens)] if op.weights else flow.at)
            alive[id(flow.shortcuts[-1])] = flow.shortcuts[-1][0]
            out, room = flow.at, NO_ROOM
        elif op.in_place:
            out, room = flow.at, flow.room
        elif op.writes_onto_shortcut and closed is not None and all(closed is not t for t in flow.shortcuts):
            out, room = closed, NO_ROOM
        else:
            out, room = [work.elements(op.target)], NO_ROOM
        alive[id(out)] = out[0]
        flow.at, flow.room = out, room
        during = sum(alive.values()) + sum(kept.values())
        if forgets:
            kept.pop(number, None)  # the op has read them
        return max(peak * self._element, during * self._element + scratch)

    def room(self, number: int, work: Work) -> Room:
        """The room that op `number` wants around its input."""
        op = self._program.ops[number]
        room = work.room(op)
        # An op that computes frames in pairs reads the kept frames in place, so it needs no room in front.
        return Room(0, room.margins) if op.makes_pairs(work) else room

    def kept_elements(self, number: int, work: Work) -> int:
        """Elements of the frames that op `number` keeps for the next chunk."""
        op = self._program.ops[number]
        b, _, h, w, c = op.source.shape(work.latent, first=True)
        m = work.room(op).margins
        return b * op.cached_frames * (m.top + h + m.bottom) * (m.left + w + m.right) * c


class Walk:
    """One rank's actions, and the bytes that are alive."""

    def __init__(self, lowered: Lowered, rank: int, runs: Runs) -> None:
        self._runs = runs
        self._low = lowered
        self._program = lowered.program
        self._element = lowered.shape.element_bytes
        self._rank = rank
        self._tally = Tally()
        self._flows: dict[Tile, _Flow] = {}
        self._portions: dict[Tile, int] = {}  # elements of a chunk that has portions left to process
        self._kept: dict[Tile, dict[int, int]] = defaultdict(dict)
        self._arriving: dict[int, int] = {}  # bytes
        self._leaving: deque[list[int]] = deque()  # due, bytes
        # Key: chunk, value and op. Value: bytes of the shortcut's portion that was sent last, and its message.
        self._portions_sent: dict[tuple[int, int, int], tuple[list[int], int]] = {}
        self._results: deque[int] = deque()
        self.kept_now = 0  # elements of temporal caches
        self._sent: dict[Any, tuple[int, int]] = {}
        self._do: dict[type[Action], Callable[[Any], None]] = {
            Emit: self._emit,
            Enter: self._enter,
            Forget: self._forget,
            Leave: self._leave,
            Pass: self._pass,
            Portion: self._portion,
            Post: self._post,
            Recall: self._recall,
            Run: self._run,
            Send: self._send,
            Share: self._share,
            Yield: self._yield,
        }

    def tally(self) -> Tally:
        """The sums over all actions of this rank."""
        for action in self._low.actions[self._rank]:
            self._do[type(action)](action)
        ops = self._program.ops
        own = [ops[op] for op in self._low.ops(self._rank)]
        self._tally.weight_bytes = self._element * sum(op.weight_elements for op in own)
        self._tally.folded_bytes = self._element * sum(op.folded_elements for op in own)
        return self._tally

    # ------------------------------------------------------------------------------------------------- live bytes
    def _beside(self, tile: Tile | None = None) -> int:
        """Living bytes other than the flow of `tile`."""
        elements = self.kept_now
        for other, flow in self._flows.items():
            if other != tile:
                elements += flow.elements
        elements += sum(self._portions.values())
        return (
            elements * self._element
            + sum(self._arriving.values())
            + sum(size for _, size in self._leaving)
            + sum(self._results)
        )

    def _peak(self, nbytes: int) -> None:
        self._tally.peak_bytes = max(self._tally.peak_bytes, nbytes)

    # -------------------------------------------------------------------------------------------------- computing
    def _run(self, run: Run) -> None:
        work = self._runs.work_of(run.tile, run.chunk, self._low.portions(run.chunk, run.part))
        flow, kept = self._flows[run.tile], self._kept[run.tile]
        own = {op: kept[op] for op in range(run.start, run.stop) if op in kept}
        after = self._runs.after(run, flow, own, work)
        self._peak(after.peak_bytes + self._beside(run.tile) - self._element * sum(own.values()))
        flow.become(after.pattern, after.room)
        if own != after.kept:
            for op in own:
                self._forget_frames(run.tile, op)
            for op, elements in after.kept.items():
                self._keep_frames(run.tile, op, elements)
        self._tally.flops += after.flops
        if run.halos:
            self._halos(run, work)

    def _keep_frames(self, tile: Tile, op: int, elements: int) -> None:
        self._forget_frames(tile, op)
        self._kept[tile][op] = elements
        self.kept_now += elements

    def _forget_frames(self, tile: Tile, op: int) -> None:
        self.kept_now -= self._kept[tile].pop(op, 0)

    def _halos(self, run: Run, work: Work) -> None:
        """Count the halos that `run` sends to other tiles."""
        key = (id(run.halos), run.start, run.stop, work)
        if key not in self._sent:
            nbytes = messages = 0
            for number, halo in run.halos.items():
                if run.start <= number < run.stop:
                    b, t, _, _, c = work.shape(self._program.ops[number].source)
                    nbytes += sum(rect.area for rect, _ in halo.sends) * b * t * c * self._element
                    messages += len(halo.sends)
            self._sent[key] = nbytes, messages
        nbytes, messages = self._sent[key]
        self._tally.sent_bytes += nbytes
        self._tally.sent_messages += messages

    def _portion(self, portion: Portion) -> None:
        tile = portion.tile
        if portion.part == 1:
            self._portions[tile] = self._flows.pop(tile).at[0]
        if portion.part < portion.parts:
            # Portions are views of the chunk's memory, which stays until the last portion has been used.
            self._flows[tile] = _Flow([0], [])
        else:
            self._flows[tile] = _Flow([self._portions.pop(tile)], [])

    def _leave(self, leave: Leave) -> None:
        self._flows.pop(leave.tile, None)

    # --------------------------------------------------------------------------------------- messages and pieces
    def _enter(self, enter: Enter) -> None:
        undivided = enter.op == self._program.portions_from and enter.fresh
        portions = 1 if undivided else self._low.portions(enter.chunk, enter.part)
        work = self._runs.work_of(enter.tile, enter.chunk, portions)
        op = self._program.ops[enter.op]
        core, _ = self._low.input_rect(enter.op, enter.tile)
        pieces = [piece for piece in enter.pieces if piece.value == 0]
        alone = len(pieces) == 1 and pieces[0].rect == core
        room = self._runs.room(enter.op, work) if op.margins and not alone else NO_ROOM
        at = [work.elements(op.source, room)]
        if enter.fresh:
            kept = [[work.elements(spec)] for spec in self._program.carried(enter.op)[1:]]
            flow = _Flow(at, [kept[which] for which in self._program.shortcuts(enter.op)], room)
        else:
            flow = _Flow(at, self._flows[enter.tile].shortcuts, room)
        taken = sum(self._arriving.pop(id(p.origin), 0) for p in enter.pieces)
        copied = 0 if alone and isinstance(pieces[0].origin, Message) else taken
        self._peak(self._beside() + copied + self._element * flow.elements)
        self._flows[enter.tile] = flow

    def _recall(self, recall: Recall) -> None:
        work = self._runs.work_of(recall.tile, recall.chunk, 1)
        elements = self._runs.kept_elements(recall.op, work)
        taken = sum(self._arriving.pop(id(p.origin), 0) for p in recall.pieces)
        self._keep_frames(recall.tile, recall.op, elements)
        self._peak(self._beside() + taken)

    def _forget(self, forget: Forget) -> None:
        self._forget_frames(forget.tile, forget.op)

    def _pass(self, passed: Pass) -> None:
        work = self._runs.work_of(passed.tile, passed.chunk, 1)
        self._keep_frames(passed.tile, passed.op, self._runs.kept_elements(passed.op, work))
        self._peak(self._beside())

    def _post(self, post: Post) -> None:
        for message in post.messages:
            self._arriving[id(message)] = self._low.message_bytes(message)

    def _send(self, send: Send) -> None:
        while self._low.must_wait([due for due, _ in self._leaving], send):
            self._leaving.popleft()
        sizes = [self._low.message_bytes(message) for message in send.messages]
        self._tally.sent_bytes += sum(sizes)
        self._tally.sent_messages += len(sizes)
        if send.forgets:
            self._forget_frames(send.tile, send.messages[0].op)
        self._leaving.append([max(message.due for message in send.messages), 0])
        sent: dict[int, int] = {}  # bytes of the flow's tensors that leave without a copy
        for message, nbytes in zip(send.messages, sizes, strict=True):
            tensor = self._sent_in_place(message, send)
            # An activation whose shortcut has just begun is sent twice, but is in memory once.
            if id(tensor) not in sent:
                self._leaving[-1][1] += nbytes
                if tensor is not None:
                    sent[id(tensor)] = nbytes + self._hold_chunk_of(message, tensor[0] * self._element, nbytes)
        self._peak(self._beside() - sum(sent.values()))

    def _sent_in_place(self, message: Message, send: Send) -> list[int] | None:
        """The activation or shortcut of the tile if `message` is sent out of its memory, not out of a copy."""
        if message.value < 0 or send.copies or send.tile not in self._flows:
            return None
        if message.rect != send.tile.at(self._low.value_scale(message.value, message.op)):
            return None
        flow = self._flows[send.tile]
        if message.value == 0:
            return flow.at if flow.room == NO_ROOM else None
        return flow.shortcuts[self._program.shortcuts(message.op).index(message.value - 1)]

    def _hold_chunk_of(self, message: Message, chunk: int, nbytes: int) -> int:
        """Count all bytes of the `chunk` while a portion of a shortcut leaves, because it is a view of the chunk.

        Returns what this adds to the `nbytes` of the message.
        """
        if message.value == 0:
            return 0
        key, more = (message.chunk, message.value, message.op), max(0, chunk - nbytes)
        if more and key in self._portions_sent:
            before, counted = self._portions_sent[key]
            before[1] -= counted
        self._leaving[-1][1] += more
        self._portions_sent[key] = self._leaving[-1], nbytes
        return more

    def _emit(self, emit: Emit) -> None:
        b, t, _, _, c = self._low.value_shape(RESULT, len(self._program), emit.chunk, emit.part)
        elements = b * t * sum(piece.rect.area for piece in emit.pieces) * c
        for piece in emit.pieces:
            self._arriving.pop(id(piece.origin), None)
        local = len(emit.pieces) == 1 and isinstance(emit.pieces[0].origin, Tile)
        decodes = self._program.direction == "decode"
        self._results.append(
            0 if local else elements * (self._low.shape.picture_bytes if decodes else self._element)
        )
        # The float picture is alive while it is converted to bytes.
        made = elements * (self._element + self._low.shape.picture_bytes) if local and decodes else 0
        self._peak(self._beside() + made)

    def _yield(self, action: Yield) -> None:
        self._results.popleft()

    def _share(self, share: Share) -> None:
        """The root gives all moments to every rank."""
        if self._rank == 0:
            shape = self._low.shape
            elements = shape.batch * shape.frames * shape.rows * shape.cols * self._program.ops[-1].target.channels
            self._tally.sent_bytes += elements * self._element
            self._tally.sent_messages += 1
