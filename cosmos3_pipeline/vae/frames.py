"""Activations in buffers with room around them, and the seam through which a slab gets its neighbours' rows.

A convolution reads frames before its chunk and, on a slab, rows beyond it. Its input is therefore written at once
into a buffer that has room for what it wants beside it, instead of being copied into one later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cosmos3_pipeline.vae.ops import NO_MARGINS, NO_ROOM, Margins, Room


class HaloExchange(Protocol):
    """What a strategy that cuts the picture supplies: neighbours' rows, and whole frames for attention.

    `rows` and `cols` say which sides of the picture are cut. Every rank of a group calls in the same order.
    """

    rows: bool
    cols: bool

    def coming(self, margins: Margins) -> Margins:
        """Those of a slab's `margins` that neighbours fill; the others lie at the edge of the picture."""
        ...

    def start(self, padded: Tensor, margins: Margins) -> Callable[[], None]:
        """Begin filling the margins of `padded` [B, T, top + H + bottom, left + W + right, C] in place.

        The middle holds this rank's slab, margins at the edge of the picture zeros. `margins` is zero on sides
        that are not cut. The returned call waits until those that are `coming` are filled.
        """
        ...

    def gather(self, slab: Tensor) -> Tensor:
        """The whole frames [B, T, H, W, C] of which every rank holds a slab, on every rank."""
        ...


@dataclass(frozen=True)
class Arrival:
    """Neighbours' rows and columns on their way into `margins` of an activation; `wait` until they are there."""

    margins: Margins
    wait: Callable[[], None]


@dataclass
class Frames:
    """An activation inside its buffer: `inner` [B, T, H, W, C] is a view of `buffer`.

    `arrival`, when it is set, is of neighbours' rows into the margins; that was begun early, so that they travel
    while the rest of the activation is computed.
    """

    buffer: Tensor
    room: Room = NO_ROOM
    arrival: Arrival | None = None

    @property
    def inner(self) -> Tensor:
        h, w = self.buffer.shape[2:4]
        m = self.room.margins
        return self.buffer[:, self.room.front :, m.top : h - m.bottom, m.left : w - m.right]

    @property
    def chunk(self) -> Tensor:
        """The frames of this chunk with their margins."""
        return self.buffer[:, self.room.front :]


def with_room(like: Tensor, shape: tuple[int, ...], room: Room, exchange: HaloExchange | None = None) -> Frames:
    """An uninitialised activation of `shape` [B, T, H, W, C] with `room`, `like` another in dtype.

    Its margins are zero but, on CPU, for those that `exchange` will fill: a convolution that does not wait for
    these reads them all the same, for outputs that nobody uses, and on an accelerator not every kernel computes
    each output by itself.
    """
    b, t, h, w, c = shape
    m = room.margins
    buffer = like.new_empty(b, room.front + t, m.top + h + m.bottom, m.left + w + m.right, c)
    frames = Frames(buffer, room)
    chunk = frames.chunk
    coming = exchange.coming(m) if exchange is not None and buffer.is_cpu else NO_MARGINS
    if m.top > coming.top:
        chunk[:, :, : m.top].zero_()
    if m.bottom > coming.bottom:
        chunk[:, :, m.top + h :].zero_()
    if m.left > coming.left:
        chunk[:, :, :, : m.left].zero_()
    if m.right > coming.right:
        chunk[:, :, :, m.left + w :].zero_()
    return frames
