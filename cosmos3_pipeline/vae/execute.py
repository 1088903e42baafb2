"""Executes the actions of one rank with tensors: runs ops, sends, receives, and assembles pieces."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosmos3_pipeline.distributed.accelerator import Region
from cosmos3_pipeline.distributed.comm import Comm, Pending
from cosmos3_pipeline.vae.assignment import Rect, Tile, whole_picture
from cosmos3_pipeline.vae.bound_ops import BoundOp, Flow
from cosmos3_pipeline.vae.frames import Arrival, Frames, with_room
from cosmos3_pipeline.vae.host_memory import keeping_large_buffers
from cosmos3_pipeline.vae.lowering import (
    PAST,
    RESULT,
    Action,
    Emit,
    Enter,
    Forget,
    Halo,
    Leave,
    Lowered,
    Message,
    Pass,
    Piece,
    Portion,
    Post,
    Recall,
    Run,
    Send,
    Share,
    Yield,
)
from cosmos3_pipeline.vae.ops import NO_MARGINS, Margins, Op
from cosmos3_pipeline.vae.pixels import Pixels, as_pixels

Clip = Callable[[int, Rect], Tensor]  # (chunk, rectangle) -> the input of the program's first op
BoundOps = Mapping[int, BoundOp[Op]]


_Index = tuple[slice, ...]


class _Strips(NamedTuple):
    """One region of a buffer, or two parallel rows or columns, which one kernel copies; the rank of each.

    along: the dimension in which the two lie apart.
    """

    where: _Index
    ranks: tuple[int, ...]
    along: int | None = None

    def of(self, buffer: Tensor) -> Tensor:
        """The regions as one view of `buffer`: [regions, B, T, H, W, C]."""
        view = buffer[self.where].unsqueeze(0)
        return view if self.along is None else view.transpose(0, self.along + 1)


class TileExchange:
    """Exchanges the halos of a tile with other tiles; `halos` has the halo of each op."""

    rows: bool
    cols: bool

    def __init__(self, lowered: Lowered, tile: Tile, comm: Comm) -> None:
        self.halos: Mapping[int, Halo] = {}
        whole = whole_picture(lowered.shape, tile.unit)
        self.rows, self.cols = tile.rect.height < whole.height, tile.rect.width < whole.width
        self._lowered = lowered
        self._tile = tile
        self._comm = comm
        self._strips: dict[tuple[int, Margins], tuple[list[_Strips], list[_Strips]]] = {}

    @property
    def cuts(self) -> bool:
        """Whether the tile is smaller than the picture."""
        return self.rows or self.cols

    def coming(self, op: int) -> Margins:
        core, reads = self._lowered.input_rect(op, self._tile)
        return Margins(
            core.top - reads.top, reads.bottom - core.bottom, core.left - reads.left, reads.right - core.right
        )

    def start(self, op: int, frames: Frames) -> Callable[[], None]:
        halo = self.halos.get(op)
        if halo is None:  # the input was assembled together with its margins
            return _nothing
        margins = frames.room.margins
        known = self._strips.get((op, margins))
        if known is None:  # cached, because computing the regions takes nearly as long as sending a halo
            core, _ = self._lowered.input_rect(op, self._tile)
            top, left = core.top - margins.top, core.left - margins.left
            known = self._strips[op, margins] = (
                _strips([(_region(rect, top, left), rank) for rect, rank in halo.sends]),
                _strips([(_region(rect, top, left), rank) for rect, rank in halo.receives]),
            )
        sends, receives, landings = list[Region](), list[Region](), list[tuple[Tensor, Tensor]]()
        for strips in known[0]:
            view = strips.of(frames.chunk)
            parts = view if view[0].is_contiguous() else view.contiguous()
            sends += zip(parts, strips.ranks, strict=True)
        for strips in known[1]:
            view = strips.of(frames.chunk)
            parts = view
            if not view[0].is_contiguous():
                parts = torch.empty_like(view, memory_format=torch.contiguous_format)
                landings.append((view, parts))
            receives += zip(parts, strips.ranks, strict=True)
        pending = self._comm.exchange(sends, receives)

        def wait() -> None:
            pending.wait()
            while landings:  # each is freed at once
                view, landing = landings.pop()
                view.copy_(landing)

        return wait

    def gather(self, op: int, part: Tensor) -> Tensor:
        halo = self.halos.get(op)
        if halo is None:
            return part
        core, whole = self._lowered.input_rect(op, self._tile)
        b, t, _, _, c = part.shape
        gathered = part.new_empty(b, t, whole.height, whole.width, c)
        _crop(gathered, whole, core).copy_(part)
        self._comm.exchange(
            [(_crop(part, core, rect), rank) for rect, rank in halo.sends],
            [(_crop(gathered, whole, rect), rank) for rect, rank in halo.receives],
        ).wait()
        return gathered


class Execution:
    """One execution of one clip's actions on rank `rank` of `lowered`.

    ops: each op that the rank runs, by its number.
    source: returns the input of a chunk.
    pixels: the format of the decoder's picture. The encoder's moments are [B, T, h, w, 2 * z_dim].
    """

    def __init__(
        self, lowered: Lowered, rank: int, ops: BoundOps, comm: Comm, source: Clip, *, pixels: Pixels = "float"
    ) -> None:
        self._low = lowered
        self._rank = rank
        self._program = lowered.program
        self._ops = ops
        self._comm = comm
        self._source = source
        self._pixels: Pixels = pixels
        self._flows: dict[Tile, Flow] = {}
        self._portions: dict[Tile, deque[Tensor]] = {}
        self._caches: dict[Tile, dict[str, Tensor]] = defaultdict(dict)
        self._exchanges: dict[Tile, TileExchange] = {}
        self._arriving: dict[int, tuple[Tensor, Pending]] = {}  # by the message's identity
        self._leaving: deque[tuple[int, Pending]] = deque()
        self._results: deque[tuple[Tensor, list[Pending]]] = deque()
        self._like: Tensor | None = None

    def results(self) -> Iterator[Tensor]:
        """The finished picture or moments in order, on the ranks that hand them out."""
        # A local variable, because an attribute would be a reference cycle that keeps the clip until collected.
        do: dict[type[Action], Callable[[Any], None]] = {
            Enter: self._enter,
            Emit: self._emit,
            Forget: self._forget,
            Leave: self._leave,
            Pass: self._pass,
            Portion: self._portion,
            Post: self._post,
            Recall: self._recall,
            Run: self._run,
            Send: self._send,
            Share: _nothing_to_do,
        }
        for action in self._low.actions[self._rank]:
            if isinstance(action, Yield):
                result, pending = self._results.popleft()
                for each in pending:
                    each.wait()
                yield result
                del result
            else:
                do[type(action)](action)
        while self._leaving:
            self._leaving.popleft()[1].wait()

    # ------------------------------------------------------------------------------------------------ computing
    def _run(self, run: Run) -> None:
        flow = self._flows[run.tile]
        flow.forgets = run.forgets
        exchange = self._exchange_of(run.tile)
        exchange.halos = run.halos
        bound = [self._ops[number] for number in range(run.start, run.stop)]
        following = [*bound[1:], self._ops.get(run.stop) if run.goes_on else None]
        with torch.no_grad(), keeping_large_buffers():
            for op, after in zip(bound, following, strict=True):
                flow.following, flow.follows_at_once = after, op is not bound[-1]
                op.run(flow)

    def _flow(self, tile: Tile, at: Frames, shortcuts: list[Tensor], *, first: bool) -> Flow:
        exchange = self._exchange_of(tile)
        flow = self._flows[tile] = Flow(
            at, shortcuts, self._caches[tile], first=first, exchange=exchange if exchange.cuts else None
        )
        return flow

    def _exchange_of(self, tile: Tile) -> TileExchange:
        if tile not in self._exchanges:
            self._exchanges[tile] = TileExchange(self._low, tile, self._comm)
        return self._exchanges[tile]

    def _portion(self, portion: Portion) -> None:
        tile = portion.tile
        if portion.part == 1:
            chunk = self._flows.pop(tile).at.inner
            self._portions[tile] = deque(part.contiguous() for part in chunk.chunk(portion.parts, dim=1))
        self._flow(tile, Frames(self._portions[tile].popleft()), [], first=False)
        if not self._portions[tile]:
            del self._portions[tile]

    def _leave(self, leave: Leave) -> None:
        self._flows.pop(leave.tile, None)

    # ------------------------------------------------------------------------------- values between ops of a chunk
    def _enter(self, enter: Enter) -> None:
        values: dict[int, list[Piece]] = {}
        for piece in enter.pieces:
            values.setdefault(piece.value, []).append(piece)
        first = enter.chunk == 0
        core, reads = self._low.input_rect(enter.op, enter.tile)
        exchange = self._exchange_of(enter.tile)
        bound = self._ops[enter.op]
        pieces = values.pop(0)
        if len(pieces) == 1 and pieces[0].rect == core:
            frames, whole = Frames(self._assembled(pieces, core, enter).contiguous()), None
        elif not bound.op.margins:
            gathered = self._assembled(pieces, reads, enter)
            # Attention reads whole frames.
            frames, whole = Frames(_crop(gathered, reads, core).contiguous()), None if reads == core else gathered
        else:
            tensors = [(piece.rect, self._taken(piece, enter)) for piece in pieces]
            like = tensors[0][1]
            b, t, _, _, c = like.shape
            shape = (b, t, core.height, core.width, c)
            room = bound.room(shape, like, first=first, exchange=exchange)
            frames, whole = with_room(like, shape, room, exchange.coming(enter.op)), None
            around = _around(core, room.margins)
            for rect, tensor in tensors:
                _crop(frames.chunk, around, rect).copy_(tensor)
            frames.arrival = Arrival(NO_MARGINS, _nothing)
        if enter.fresh:
            kept = [
                self._assembled(values[v], enter.tile.at(self._low.value_scale(v, enter.op)), enter)
                for v in sorted(values)
            ]
            shortcuts = [kept[which] for which in self._program.shortcuts(enter.op)]
            flow = self._flow(enter.tile, frames, shortcuts, first=first)
        else:
            flow = self._flows[enter.tile]
            flow.at = frames
        flow.whole = whole

    def _assembled(self, pieces: Sequence[Piece], wanted: Rect, enter: Enter) -> Tensor:
        """The rectangle `wanted` of a value, assembled from its pieces, in memory that ops may overwrite."""
        if len(pieces) == 1:
            taken = self._taken(pieces[0], enter)
            # A tile's tensor is copied, because other readers of the tile still need it.
            return (
                taken.clone(memory_format=torch.contiguous_format) if isinstance(pieces[0].origin, Tile) else taken
            )
        tensors = [(piece.rect, self._taken(piece, enter)) for piece in pieces]
        b, t, _, _, c = tensors[0][1].shape
        whole = tensors[0][1].new_empty(b, t, wanted.height, wanted.width, c)
        for rect, tensor in tensors:
            _crop(whole, wanted, rect).copy_(tensor)
        return whole

    def _taken(self, piece: Piece, enter: Enter) -> Tensor:
        """The tensor of one piece of the input of op `enter.op`."""
        origin = piece.origin
        if isinstance(origin, Message):
            return self._received(origin)
        if origin is None:
            return self._source(enter.chunk, piece.rect)
        scale = self._low.value_scale(piece.value, enter.op)
        return _crop(self._value(origin, piece.value, enter.op), origin.at(scale), piece.rect)

    def _value(self, tile: Tile, value: int, op: int) -> Tensor:
        """The activation before op `op` on `tile` (value 0), or the tensor of an open shortcut."""
        flow = self._flows[tile]
        if value == 0:
            return flow.at.inner
        return flow.shortcuts[self._program.shortcuts(op).index(value - 1)]

    # ---------------------------------------------------------------------------- temporal caches between chunks
    def _recall(self, recall: Recall) -> None:
        bound = self._ops[recall.op]
        around = self._around_kept(recall.op, recall.tile)
        tensors = [(piece.rect, self._kept(piece, recall.op)) for piece in recall.pieces]
        first = recall.pieces[0]
        if len(tensors) == 1 and first.rect == around and isinstance(first.origin, Message):
            kept = tensors[0][1]
        else:
            b, t, _, _, c = tensors[0][1].shape
            kept = tensors[0][1].new_zeros(b, t, around.height, around.width, c)
            for rect, tensor in tensors:
                _crop(kept, around, rect).copy_(tensor)
        self._caches[recall.tile][bound.op.name] = kept

    def _kept(self, piece: Piece, op: int) -> Tensor:
        if isinstance(piece.origin, Message):
            return self._received(piece.origin)
        assert piece.origin is not None
        return self._kept_part(piece.origin, op, piece.rect)

    def _forget(self, forget: Forget) -> None:
        self._caches[forget.tile].pop(self._program.ops[forget.op].name, None)

    def _pass(self, passed: Pass) -> None:
        self._ops[passed.op].pass_by(self._flows[passed.tile])

    # ------------------------------------------------------------------------------------------------- messages
    def _post(self, post: Post) -> None:
        for _, group in groupby(post.messages, key=lambda message: message.group):
            messages = list(group)
            buffers = [self._buffer(message) for message in messages]
            pending = self._comm.pass_on(
                receives=[(buffer, message.source) for buffer, message in zip(buffers, messages, strict=True)]
            )
            for message, buffer in zip(messages, buffers, strict=True):
                self._arriving[id(message)] = buffer, pending

    def _buffer(self, message: Message) -> Tensor:
        like = self._like_of_messages()
        b, t, h, w, c = self._low.message_shape(message)
        if message.value != RESULT or self._program.direction == "encode":
            return like.new_empty(b, t, h, w, c)
        return _picture(like, (b, t, h, w, c), self._pixels)

    def _like_of_messages(self) -> Tensor:
        if self._like is None:
            self._like = self._source(0, Rect(0, 0, 0, 0))
        return self._like

    def _received(self, message: Message) -> Tensor:
        buffer, pending = self._arriving.pop(id(message))
        pending.wait()
        return buffer

    def _send(self, send: Send) -> None:
        while self._low.must_wait([due for due, _ in self._leaving], send):
            self._leaving.popleft()[1].wait()
        tensors = [self._part(message, send.tile) for message in send.messages]
        if send.copies:
            tensors = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
        pending = self._comm.pass_on(
            sends=[(tensor, message.target) for tensor, message in zip(tensors, send.messages, strict=True)]
        )
        self._leaving.append((max(message.due for message in send.messages), pending))
        if send.forgets:
            self._caches[send.tile].pop(self._program.ops[send.messages[0].op].name)

    def _part(self, message: Message, tile: Tile) -> Tensor:
        if message.value == PAST:
            return self._kept_part(tile, message.op, message.rect)
        if message.value == RESULT:
            return self._result_of(tile)
        scale = self._low.value_scale(message.value, message.op)
        return _crop(self._value(tile, message.value, message.op), tile.at(scale), message.rect)

    def _kept_part(self, tile: Tile, op: int, rect: Rect) -> Tensor:
        """The rectangle `rect` of the frames that op `op` has kept on `tile`. Kept frames include margins."""
        return _crop(self._caches[tile][self._program.ops[op].name], self._around_kept(op, tile), rect)

    def _around_kept(self, op: int, tile: Tile) -> Rect:
        """The rectangle of the frames that `op` keeps on `tile`, including zeros beyond the picture's edge."""
        exchange = self._exchange_of(tile)
        core, _ = self._low.input_rect(op, tile)
        room = self._program.ops[op].room(first=False, cut_rows=exchange.rows, cut_cols=exchange.cols)
        return _around(core, room.margins)

    # ----------------------------------------------------------------------------------------- the finished result
    def _result_of(self, tile: Tile) -> Tensor:
        result = self._flows[tile].at.inner if self._program.direction == "encode" else self._flows[tile].at.buffer
        return result if self._program.direction == "encode" else as_pixels(result, self._pixels)

    def _emit(self, emit: Emit) -> None:
        whole = whole_picture(self._low.shape, self._program.ops[-1].target.scale)
        if len(emit.pieces) == 1 and isinstance(emit.pieces[0].origin, Tile):
            self._results.append((self._result_of(emit.pieces[0].origin), []))
            return
        b, t, _, _, c = self._low.value_shape(RESULT, len(self._program), emit.chunk, emit.part)
        picture = self._program.direction == "decode"
        shape = (b, t, whole.height, whole.width, c)
        like = self._like_of_messages()
        result = _picture(like, shape, self._pixels) if picture else like.new_empty(shape)
        dim = 3 if picture and self._pixels == "float" else 2
        pending: list[Pending] = []
        direct: list[tuple[Tensor, int]] = []
        for piece in emit.pieces:
            place = _crop(result, whole, piece.rect, dim)
            if isinstance(piece.origin, Tile):
                place.copy_(self._result_of(piece.origin))
            elif isinstance(piece.origin, Message) and id(piece.origin) in self._arriving:
                place.copy_(self._received(piece.origin))
            elif isinstance(piece.origin, Message):
                direct.append((place, piece.origin.source))
        if direct:
            pending.append(self._comm.pass_on(receives=direct))
        self._results.append((result, pending))


def _picture(like: Tensor, shape: tuple[int, int, int, int, int], pixels: Pixels) -> Tensor:
    """An uninitialised picture of `shape` [B, T, H, W, C]; floats are stored as [B, C, T, H, W]."""
    b, t, h, w, c = shape
    if pixels == "uint8":
        return torch.empty(shape, dtype=torch.uint8, device=like.device)
    return like.new_empty(b, c, t, h, w)


def _crop(tensor: Tensor, whole: Rect, part: Rect, dim: int = 2) -> Tensor:
    """The view `part` of a tensor that covers `whole`; its rows are in `dim`, its columns in `dim` + 1."""
    if part == whole:
        return tensor
    rows = tensor.narrow(dim, part.top - whole.top, part.height)
    return rows.narrow(dim + 1, part.left - whole.left, part.width)


def _region(rect: Rect, top: int, left: int) -> tuple[slice, ...]:
    """The index of `rect` in a buffer [B, T, H, W, C] whose first pixel is at (`top`, `left`)."""
    rows, cols = slice(rect.top - top, rect.bottom - top), slice(rect.left - left, rect.right - left)
    return slice(None), slice(None), rows, cols


def _strips(regions: Sequence[tuple[_Index, int]]) -> list[_Strips]:
    """The regions in strips: two rows or columns of the same extent together."""
    found, left = list[_Strips](), list(regions)
    # Two messages to one rank keep their order.
    may_pair = len({rank for _, rank in left}) == len(left)
    while left:
        where, rank = left.pop(0)
        others = [(other, along) for other in left if may_pair and (along := _apart(where, other[0]))]
        if not others:
            found.append(_Strips(where, (rank,)))
            continue
        (other, along), index = others[0], list(where)
        left.remove(other)
        (near, first), (far, second) = sorted([(where[along].start, rank), (other[0][along].start, other[1])])
        index[along] = slice(near, far + 1, far - near)
        found.append(_Strips(tuple(index), (first, second), along))
    return found


def _apart(a: _Index, b: _Index) -> int:
    """The dimension, rows (2) or columns (3), in which `a` and `b` are lines of the same extent; 0 if in none.

    They are two lines: a tile of one row sends the same row up and down.
    """
    for dim, same in ((2, 3), (3, 2)):
        if a != b and a[same] == b[same] and all(part[dim].stop - part[dim].start == 1 for part in (a, b)):
            return dim
    return 0


def _around(core: Rect, m: Margins) -> Rect:
    """`core` with all of its margins, even beyond the edge of the picture."""
    return Rect(core.top - m.top, core.bottom + m.bottom, core.left - m.left, core.right + m.right)


def _nothing() -> None:
    return


def _nothing_to_do(action: Action) -> None:
    return
