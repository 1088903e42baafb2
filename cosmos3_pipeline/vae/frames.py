"""Activations in buffers with room around them, and the interface through which a slab gets its halo.

A convolution reads frames before its chunk and, on a slab, a halo. The previous op therefore writes its output
into a buffer that has room for both, so that no copy is needed later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cosmos3_pipeline.vae.ops import NO_MARGINS, NO_ROOM, Margins, Room


class HaloExchange(Protocol):
    """Gives the ops on a tile their halo, and whole frames for attention. `op` is the number of an op.

    `rows` and `cols`: whether the tile has fewer rows or columns than the picture.
    """

    rows: bool
    cols: bool

    def coming(self, op: int) -> Margins:
        """The margins around the input of `op` that lie on other tiles, not beyond the edge of the picture."""
        ...

    def start(self, op: int, frames: Frames) -> Callable[[], None]:
        """Begin filling the margins of `frames`, the input of `op`, in place.

        Its inner part holds the tile. Margins at the edge of the picture are zeros. The returned function waits
        until the margins that are `coming` are filled.
        """
        ...

    def gather(self, op: int, part: Tensor) -> Tensor:
        """The whole frames [B, T, H, W, C] of the input of `op`; `part` is this tile's rectangle of them."""
        ...


@dataclass(frozen=True)
class Arrival:
    """A halo in flight into the `margins` of an activation; `wait` returns when it has arrived."""

    margins: Margins
    wait: Callable[[], None]


@dataclass
class Frames:
    """An activation inside its buffer: `inner` [B, T, H, W, C] is a view of `buffer`.

    arrival: the halo in flight into the margins. It was sent early, while the rest of the activation was computed.
    recalled: the kept frames are in front already, and the frames for the next chunk are kept already.
    owed: a tensor that the next norm adds to `buffer` before it reads `buffer`.
    """

    buffer: Tensor
    room: Room = NO_ROOM
    arrival: Arrival | None = None
    recalled: bool = False
    owed: Tensor | None = None

    @property
    def inner(self) -> Tensor:
        h, w = self.buffer.shape[2:4]
        m = self.room.margins
        return self.buffer[:, self.room.front :, m.top : h - m.bottom, m.left : w - m.right]

    @property
    def chunk(self) -> Tensor:
        """The frames of this chunk with their margins."""
        return self.buffer[:, self.room.front :]


def with_room(like: Tensor, shape: tuple[int, ...], room: Room, coming: Margins = NO_MARGINS) -> Frames:
    """An uninitialised activation of `shape` [B, T, H, W, C] with `room`, in dtype and device of `like`.

    Its margins are zero, except those that are `coming`, which stay uninitialised until they arrive.
    """
    b, t, h, w, c = shape
    m = room.margins
    buffer = like.new_empty(b, room.front + t, m.top + h + m.bottom, m.left + w + m.right, c)
    frames = Frames(buffer, room)
    chunk = frames.chunk
    if m.top > coming.top:
        chunk[:, :, : m.top].zero_()
    if m.bottom > coming.bottom:
        chunk[:, :, m.top + h :].zero_()
    if m.left > coming.left:
        chunk[:, :, :, : m.left].zero_()
    if m.right > coming.right:
        chunk[:, :, :, m.left + w :].zero_()
    return frames
