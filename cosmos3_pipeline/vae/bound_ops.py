"""Each op of a program with its weights bound: one small class per op type.

An op reads `flow.at`, the activation of the chunk, and replaces it by its output. Layout: [B, T, H, W, C].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from cosmos3_pipeline.distributed.host_path import takes_host_path
from cosmos3_pipeline.vae import kernels, ops
from cosmos3_pipeline.vae.blocking import NORM_BLOCK_ELEMENTS, ONE_KERNEL_ELEMENTS
from cosmos3_pipeline.vae.convolution import Convolution, upsampling_weights
from cosmos3_pipeline.vae.frames import Arrival, Frames, HaloExchange, with_room
from cosmos3_pipeline.vae.ops import NO_MARGINS, NO_ROOM, Margins, Room

# On a CPU, a norm of at most this many blocks is one call. It takes about a millisecond, and separate calls for
# the edges would cost more than sending the edges early saves.
NORM_BLOCKS_AT_ONCE = 8


@dataclass
class Flow:
    """One portion of a chunk between two ops on one tile: the activation and the tensors of open shortcuts.

    cache: the temporal cache: the frames that each op keeps for the next chunk, by the op's name.
    first: whether this is the clip's first chunk.
    exchange: the source of halos; None if the tile is the whole picture.
    whole: the whole frames that an attention reads, if they are assembled already.
    forgets: the ops whose kept frames are not needed again.
    following: the next op.
    follows_at_once: whether no other action comes before the next op.
    """

    at: Frames
    shortcuts: list[Tensor]
    cache: dict[str, Tensor]
    first: bool
    exchange: HaloExchange | None
    whole: Tensor | None = None
    forgets: frozenset[int] = frozenset()
    following: BoundOp[ops.Op] | None = None
    follows_at_once: bool = False


_Part = tuple[slice, slice]
OpT = TypeVar("OpT", bound=ops.Op)


class BoundOp(ABC, Generic[OpT]):
    """An op of a program and its weights. `number` is its index in the program.

    begins_before_halo: an accelerator's kernel reads margins before they have arrived, for outputs that nobody
    uses. Margins are zeroed for it, because some kernels do not compute each output independently. A CPU's do.
    """

    begins_before_halo: ClassVar[bool] = False

    def __init__(self, number: int, op: OpT, weights: Mapping[str, Tensor]) -> None:
        self.number = number
        self.op = op

    def room(self, shape: Sequence[int], like: Tensor, *, first: bool, exchange: HaloExchange | None) -> Room:
        """The room that `run` wants around its input of `shape`, with dtype and device of `like`."""
        if exchange is None:
            return self.op.room(first=first)
        return self.op.room(first=first, cut_rows=exchange.rows, cut_cols=exchange.cols)

    @abstractmethod
    def run(self, flow: Flow) -> None:
        """Replace `flow.at` by the op's output."""

    def pass_by(self, flow: Flow) -> None:
        """Keep the input frames that this rank needs for a later chunk; another rank runs the op on this chunk."""
        name, count = self.op.name, self.op.cached_frames
        if not count:
            return
        x = flow.at.inner
        before = flow.cache.pop(name, None)
        if x.shape[1] >= count:
            flow.cache[name] = x[:, -count:].clone(memory_format=torch.contiguous_format)
            return
        if before is None:
            before = x.new_zeros(x.shape[0], count, *x.shape[2:])
        flow.cache[name] = torch.cat((before[:, x.shape[1] :], x), dim=1)

    def _tensors(self, weights: Mapping[str, Tensor]) -> list[Tensor]:
        return [weights[w.name] for w in self.op.weights]


def _take(flow: Flow, bound: BoundOp[Any]) -> Frames:
    """The activation with the room that `bound` wants. It is copied only if its buffer does not have this room."""
    inner = flow.at.inner
    room = bound.room(inner.shape, inner, first=flow.first, exchange=flow.exchange)
    if flow.at.room == room:
        return flow.at
    assert flow.at.arrival is None, "margins are on their way into a room that is not the one wanted"
    frames = _with_room(flow, bound, room)
    frames.inner.copy_(inner)
    flow.at = frames
    return frames


def _with_room(flow: Flow, bound: BoundOp[Any], room: Room) -> Frames:
    """An activation like that of `flow` with `room`, to be the input of `bound`."""
    x, coming = flow.at.inner, NO_MARGINS
    if flow.exchange is not None and room.margins and (takes_host_path(x) or not bound.begins_before_halo):
        coming = flow.exchange.coming(bound.number)
    return with_room(x, tuple(x.shape), room, coming)


def _begin(flow: Flow, frames: Frames, bound: BoundOp[Any]) -> None:
    """Start the halo exchange into the margins of `frames`, the input of `bound`, unless it was started before."""
    exchange = flow.exchange
    if frames.arrival is None and exchange is not None and bound.op.margins and (exchange.rows or exchange.cols):
        frames.arrival = Arrival(exchange.coming(bound.number), exchange.start(bound.number, frames))


def _recall(flow: Flow, name: str, frames: Frames) -> None:
    """Copy the frames kept from the previous chunk in front of this chunk's frames; zeros if none were kept."""
    front = frames.buffer[:, : frames.room.front]
    if name in flow.cache:
        front.copy_(flow.cache[name])
    else:
        front.zero_()


def _remember(flow: Flow, bound: BoundOp[Any], buffer: Tensor) -> None:
    """Keep the last frames of `buffer` that the op needs for the next chunk; missing frames are zeros."""
    name, count = bound.op.name, bound.op.cached_frames
    if bound.number in flow.forgets:
        flow.cache.pop(name, None)
        return
    if name not in flow.cache:
        b, _, h, w, c = buffer.shape
        flow.cache[name] = buffer.new_zeros(b, count, h, w, c)
    have = min(count, buffer.shape[1])
    flow.cache[name][:, count - have :].copy_(buffer[:, -have:])


def _may_stay(flow: Flow, buffer: Tensor, count: int) -> bool:
    """Whether `buffer` can be kept without a copy: it has `count` frames and shares memory with no tensor."""
    alone = buffer.untyped_storage().nbytes() == buffer.nbytes
    return buffer.shape[1] == count and alone and not any(_same_memory(buffer, kept) for kept in flow.shortcuts)


def _closed(flow: Flow) -> Tensor:
    """The tensor of the innermost shortcut, safe to overwrite: a copy if an outer shortcut shares the tensor."""
    kept = flow.shortcuts.pop()
    return kept.clone() if any(_same_memory(kept, outer) for outer in flow.shortcuts) else kept


def _is_added_later(flow: Flow) -> bool:
    """Whether the next op adds this op's result to the shortcut, in the pass in which it reads the sum."""
    following = flow.following
    if takes_host_path(flow.at.buffer) or not flow.follows_at_once or following is None:
        return False
    return isinstance(following.op, ops.NormSilu) or (
        isinstance(following.op, ops.ShortcutBegin) and not following.op.weights
    )


def _same_memory(a: Tensor, b: Tensor) -> bool:
    # The storage is compared, because a meta tensor has no data address.
    return int(a.untyped_storage()._cdata) == int(b.untyped_storage()._cdata)


def _edges_first(height: int, width: int, margins: Margins) -> tuple[list[_Part], list[_Part]]:
    """Split a slab into (rows, columns): the edges that neighbours read as their halo, and the rest."""
    rows, between = _edges(height, margins.bottom, margins.top)
    cols, inner = _edges(width, margins.right, margins.left)
    edges = [*((part, slice(0, width)) for part in rows), *((between, part) for part in cols if _length(between))]
    return edges, [(between, inner)] if _length(between) and _length(inner) else []


def _edges(length: int, before: int, behind: int) -> tuple[list[slice], slice]:
    """The first `before` and the last `behind` of `length` rows, and the rows between.

    The first row and the last one are one slice, because one kernel then computes both.
    """
    start = min(before, length)
    stop = max(length - behind, start)
    if before == behind == 1 and length > 1:
        return [slice(0, length, length - 1)], slice(start, stop)
    return [part for part in (slice(0, start), slice(stop, length)) if _length(part)], slice(start, stop)


def _length(part: slice) -> int:
    return int(part.stop - part.start)


class Conv(BoundOp[ops.Conv]):
    def __init__(self, number: int, op: ops.Conv, weights: Mapping[str, Tensor]) -> None:
        super().__init__(number, op, weights)
        self._conv = Convolution(*self._tensors(weights))

    def room(self, shape: Sequence[int], like: Tensor, *, first: bool, exchange: HaloExchange | None) -> Room:
        """No room in front if frames are computed in pairs, because pairs read the kept frames in the cache."""
        room = super().room(shape, like, first=first, exchange=exchange)
        return Room(0, room.margins) if self._conv.makes_pairs(shape, like) else room

    def run(self, flow: Flow) -> None:
        name, count = self.op.name, self.op.cached_frames
        frames = _take(flow, self)
        cut, own = frames.room.margins, self.op.margins
        apart = not flow.first and count > frames.room.front
        if frames.room.front and not frames.recalled:
            _recall(flow, name, frames)
        _begin(flow, frames, self)
        before = None
        if apart:
            before = flow.cache.get(name)
            if before is None:  # a rank that starts its warm-up in the middle of a clip
                b, _, h, w, c = frames.buffer.shape
                before = frames.buffer.new_zeros(b, count, h, w, c)
        shortcut = _closed(flow) if self.op.adds_shortcut else None
        owed_to = shortcut if _is_added_later(flow) else None
        out = self._conv(
            frames.buffer,
            before=before,
            padding=(own.top - cut.top, own.left - cut.left),
            taps=1 if flow.first else 0,
            onto=None if owed_to is not None else shortcut,
            arrival=frames.arrival,
        )
        if apart and self.number not in flow.forgets and _may_stay(flow, frames.buffer, count):
            flow.cache[name] = frames.buffer
        elif count and not frames.recalled:
            _remember(flow, self, frames.buffer)
        flow.at = Frames(out) if owed_to is None else Frames(owed_to, owed=out)


class NormSilu(BoundOp[ops.NormSilu]):
    def __init__(self, number: int, op: ops.NormSilu, weights: Mapping[str, Tensor]) -> None:
        super().__init__(number, op, weights)
        (gamma,) = self._tensors(weights)
        self._gamma = kernels.norm_weight(gamma)

    def run(self, flow: Flow) -> None:
        x, following, owed = flow.at.inner, flow.following, flow.at.owed
        if following is None:
            frames = with_room(x, tuple(x.shape), NO_ROOM)
        else:
            room = following.room(x.shape, x, first=flow.first, exchange=flow.exchange)
            frames = _with_room(flow, following, room)
        if self._recalls(flow, frames.room):
            self._after_kept(flow, frames)
            return
        out, margins = frames.inner, frames.room.margins
        edges, rest = _edges_first(x.shape[2], x.shape[3], margins)
        at_once = NORM_BLOCKS_AT_ONCE * NORM_BLOCK_ELEMENTS if takes_host_path(x) else ONE_KERNEL_ELEMENTS
        if x.numel() <= at_once:
            edges, rest = [(slice(0, x.shape[2]), slice(0, x.shape[3]))], []
        for part in edges:
            self._norm(x, owed, out, part)
        # The halo that other tiles wait for is ready, so it is sent while the rest is computed.
        if following is not None:
            _begin(flow, frames, following)
        for part in rest:
            self._norm(x, owed, out, part)
        flow.at = frames

    def _norm(self, x: Tensor, owed: Tensor | None, out: Tensor, part: _Part) -> None:
        at = (slice(None), slice(None), *part)
        kernels.norm_silu(x[at], self._gamma, out[at], added=None if owed is None else owed[at])

    def _recalls(self, flow: Flow, room: Room) -> bool:
        """Whether the same kernel also copies the next op's kept frames to the front of its input.

        Not possible on a slab, because there the kept frames have margins, which arrive from other slabs later.
        """
        return (
            bool(room.front) and not room.margins and flow.follows_at_once and not takes_host_path(flow.at.buffer)
        )

    def _after_kept(self, flow: Flow, frames: Frames) -> None:
        assert flow.following is not None
        x, name = flow.at.inner, flow.following.op.name
        if name not in flow.cache:  # a rank that starts its warm-up in the middle of a clip
            b, _, h, w, c = x.shape
            flow.cache[name] = x.new_zeros(b, frames.room.front, h, w, c)
        kept, owed = flow.cache[name], flow.at.owed
        if owed is None:
            torch.ops.cosmos3.norm_silu_after(x, self._gamma, kept, out=frames.buffer)
        else:
            torch.ops.cosmos3.add_norm_silu_after(x, owed, self._gamma, kept, out=frames.buffer)
        if flow.following.number in flow.forgets:
            del flow.cache[name]
        frames.recalled = True
        flow.at = frames


class Attention(BoundOp[ops.Attention]):
    def __init__(self, number: int, op: ops.Attention, weights: Mapping[str, Tensor]) -> None:
        super().__init__(number, op, weights)
        gamma, qkv, qkv_bias, proj, proj_bias = self._tensors(weights)
        self._gamma = kernels.norm_weight(gamma)
        self._qkv = (qkv.flatten(1), qkv_bias)
        self._proj = (proj.flatten(1), proj_bias)

    def run(self, flow: Flow) -> None:
        x = flow.at.inner
        normed = whole = torch.ops.cosmos3.vae_norm(x, self._gamma)
        # Keys and values need whole frames.
        if flow.whole is not None:
            whole, flow.whole = torch.ops.cosmos3.vae_norm(flow.whole, self._gamma), None
        elif flow.exchange is not None:
            whole = flow.exchange.gather(self.number, normed)
        mixed = kernels.attention(normed, whole, self._qkv, self._proj)
        flow.at = Frames(x + mixed)


class TimeUp(BoundOp[ops.TimeUp]):
    def __init__(self, number: int, op: ops.TimeUp, weights: Mapping[str, Tensor]) -> None:
        super().__init__(number, op, weights)
        self._conv = Convolution(*self._tensors(weights))

    def run(self, flow: Flow) -> None:
        if flow.first:
            return  # unchanged and not kept: the next chunk sees zeros
        frames = _take(flow, self)
        _recall(flow, self.op.name, frames)
        _remember(flow, self, frames.buffer)
        pairs = self._conv(frames.buffer)
        b, t, h, w, c = pairs.shape
        pairs = pairs.view(b, t, h, w, 2, c // 2).permute(0, 1, 4, 2, 3, 5)
        # The next convolution needs contiguous pixels, but `reshape` of one frame is a view without them.
        flow.at = Frames(pairs.reshape(b, 2 * t, h, w, c // 2).contiguous())


class TimeDown(BoundOp[ops.TimeDown]):
    def __init__(self, number: int, op: ops.TimeDown, weights: Mapping[str, Tensor]) -> None:
        super().__init__(number, op, weights)
        self._conv = Convolution(*self._tensors(weights))

    def run(self, flow: Flow) -> None:
        frames = _take(flow, self)
        if not flow.first:
            _recall(flow, self.op.name, frames)
        _remember(flow, self, frames.buffer)
        if not flow.first:
            flow.at = Frames(self._conv(frames.buffer, stride=(2, 1, 1)))


def _reads(row: int, col: int, margins: Margins) -> bool:
    """Whether outputs of an upsampling at this offset (row, col) of the doubled grid read a pixel in `margins`.

    Even output rows also read the input row above, odd output rows the input row below. Columns are alike.
    """
    return bool((margins.bottom if row else margins.top) or (margins.right if col else margins.left))


class SpatialUp(BoundOp[ops.SpatialUp]):
    begins_before_halo: ClassVar[bool] = True

    def __init__(self, number: int, op: ops.SpatialUp, weights: Mapping[str, Tensor]) -> None:
        super().__init__(number, op, weights)
        weight, bias = self._tensors(weights)
        self._convs = [Convolution(w, bias) for w in upsampling_weights(weight)]

    def run(self, flow: Flow) -> None:
        frames = _take(flow, self)
        b, t, h, w, _ = frames.inner.shape
        _begin(flow, frames, self)
        out = frames.buffer.new_empty(b, t, h, 2, w, 2, self.op.target.channels)
        kept = None if self.op.duplicates is None else flow.shortcuts.pop()
        offsets = [(row, col) for row in (0, 1) for col in (0, 1)]
        # Outputs that need no halo are computed before the rank waits for it.
        early = [at for at in offsets if frames.arrival is not None and not _reads(*at, frames.arrival.margins)]
        for at in early:
            self._make(*at, frames, kept, first=flow.first, out=out)
        if frames.arrival is not None:
            frames.arrival.wait()
        for at in offsets:
            if at not in early:
                self._make(*at, frames, kept, first=flow.first, out=out)
        flow.at = Frames(out.view(b, t, 2 * h, 2 * w, -1))

    def _make(self, row: int, col: int, frames: Frames, kept: Tensor | None, *, first: bool, out: Tensor) -> None:
        """Write the outputs at one offset of the upsampled grid to `out` [B, T, H, 2, W, 2, C]."""
        _, _, h, w, _ = frames.inner.shape
        cut = frames.room.margins
        # One output more than needed on each axis: the kernel is even and the padding symmetric.
        outputs = self._convs[2 * row + col](frames.buffer, padding=(1 - cut.top, 1 - cut.left))
        part, place = outputs[:, :, row : row + h, col : col + w], out[:, :, :, row, :, col]
        if kept is None:
            place.copy_(part)
        else:
            self._add(part, kept, row, col, first=first, out=place)

    def _add(self, part: Tensor, kept: Tensor, row: int, col: int, *, first: bool, out: Tensor) -> None:
        """out = part + the copies of `kept` for the same outputs; `part` are those at one offset of the grid.

        All are [B, T, H, W, C] with the rows and columns before upsampling.
        """
        added = self._duplicates()
        dropped = added.factor_t - 1 if first else 0
        for time in range(dropped, added.factor_t):
            frames = slice(time - dropped, None, added.factor_t - dropped)
            torch.add(part[:, frames], self._copy(kept, time, row, col), out=out[:, frames])

    def _copy(self, kept: Tensor, time: int, row: int, col: int) -> Tensor:
        """The channels of `kept` for the output channels at one offset of the upsampled grid."""
        added = self._duplicates()
        offset = (time * added.factor_s + row) * added.factor_s + col
        if added.factor % added.copies == 0:
            return kept[..., offset // added.copies :: added.factor // added.copies]
        outputs = torch.arange(self.op.target.channels, device=kept.device)
        return kept.index_select(-1, (outputs * added.factor + offset) // added.copies)

    def _duplicates(self) -> ops.Duplicates:
        assert self.op.duplicates is not None
        return self.op.duplicates


class SpatialDown(BoundOp[ops.SpatialDown]):
    def __init__(self, number: int, op: ops.SpatialDown, weights: Mapping[str, Tensor]) -> None:
        super().__init__(number, op, weights)
        weight, bias = self._tensors(weights)
        self._conv = Convolution(weight.unsqueeze(2), bias)

    def run(self, flow: Flow) -> None:
        frames = _take(flow, self)
        _begin(flow, frames, self)
        flow.at = Frames(self._conv(frames.buffer, stride=(1, 2, 2), arrival=frames.arrival))


class ShortcutBegin(BoundOp[ops.ShortcutBegin]):
    def __init__(self, number: int, op: ops.ShortcutBegin, weights: Mapping[str, Tensor]) -> None:
        super().__init__(number, op, weights)
        self._conv = Convolution(*self._tensors(weights)) if op.weights else None

    def run(self, flow: Flow) -> None:
        if flow.at.owed is not None and not _is_added_later(flow):
            flow.at = Frames(flow.at.buffer.add_(flow.at.owed))
        x = _take(flow, self).buffer
        flow.shortcuts.append(x if self._conv is None else self._conv(x))


class AverageDown(BoundOp[ops.AverageDown]):
    def run(self, flow: Flow) -> None:
        kept, out = flow.shortcuts.pop(), flow.at.inner
        if not self.op.averages:
            out.add_(kept)
            return
        ft, fs = self.op.factor_t, self.op.factor_s
        missing = -kept.shape[1] % ft
        if missing:
            b, _, h, w, c = kept.shape
            kept = torch.cat((kept.new_zeros(b, missing, h, w, c), kept), dim=1)
        b, t, h, w, c = kept.shape
        cells = kept.view(b, t // ft, ft, h // fs, fs, w // fs, fs, c).permute(0, 1, 3, 5, 7, 2, 4, 6)
        out.add_(cells.reshape(*out.shape, -1).mean(dim=-1))


class Patchify(BoundOp[ops.Patchify]):
    def run(self, flow: Flow) -> None:
        p = self.op.patch
        b, c, t, h, w = flow.at.buffer.shape
        cells = flow.at.buffer.view(b, c, t, h // p, p, w // p, p).permute(0, 2, 3, 5, 1, 6, 4)
        flow.at = Frames(cells.reshape(b, t, h // p, w // p, c * p * p).contiguous())


class Unpatchify(BoundOp[ops.Unpatchify]):
    def run(self, flow: Flow) -> None:
        p = self.op.patch
        x = flow.at.inner
        b, t, h, w, c = x.shape
        cells = x.reshape(b, t, h, w, c // p**2, p, p).permute(0, 4, 1, 2, 6, 3, 5)
        flow.at = Frames(cells.reshape(b, c // p**2, t, h * p, w * p).clamp_(-1.0, 1.0))


_BOUND: dict[type[ops.Op], type[BoundOp]] = {  # type: ignore[type-arg]
    ops.Conv: Conv,
    ops.NormSilu: NormSilu,
    ops.Attention: Attention,
    ops.TimeUp: TimeUp,
    ops.TimeDown: TimeDown,
    ops.SpatialUp: SpatialUp,
    ops.SpatialDown: SpatialDown,
    ops.ShortcutBegin: ShortcutBegin,
    ops.AverageDown: AverageDown,
    ops.Patchify: Patchify,
    ops.Unpatchify: Unpatchify,
}


def bind(number: int, op: ops.Op, weights: Mapping[str, Tensor]) -> BoundOp[ops.Op]:
    """The runnable form of an op, holding its tensors out of `weights`."""
    return _BOUND[type(op)](number, op, weights)
