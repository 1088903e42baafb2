"""What slabs hand each other while the ops run, and how their results come together on the root."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.vae.ops import Margins
from cosmos3_plugins.spatial_shard.slabs import Grid, Slab, inner_edge

Region = tuple[Tensor, int]  # part of a tensor, with any strides, and the rank that it goes to or comes from


def transfer(comm: Comm, sends: Sequence[Region], receives: Sequence[Region]) -> Callable[[], None]:
    """Start sending and receiving regions; when the returned call returns, they have left and arrived.

    Regions must not be written (sends) or read (receives) before that.
    """
    landings = [
        (
            region if region.is_contiguous() else torch.empty_like(region, memory_format=torch.contiguous_format),
            peer,
        )
        for region, peer in receives
    ]
    pending = comm.exchange([(region.contiguous(), peer) for region, peer in sends], landings)

    def finish() -> None:
        pending.wait()
        for (region, _), (landing, _) in zip(receives, landings, strict=True):
            if landing is not region:
                region.copy_(landing)

    return finish


def slab_of(whole: Tensor, slab: Slab, scale: int, dim: int) -> Tensor:
    """The part of `whole` on `slab`: `scale` rows per latent row, rows in `dim`, columns in `dim` + 1."""
    rows = whole.narrow(dim, slab.rows[0] * scale, slab.height * scale)
    return rows.narrow(dim + 1, slab.cols[0] * scale, slab.width * scale)


class SlabExchange:
    """The executor's seam for one slab of a grid. Slab i is on rank `base` + i of `comm`.

    Only frames of the current chunk travel: the convolutions keep the margins of their cached frames with them.
    """

    def __init__(self, comm: Comm, grid: Grid, *, base: int = 0) -> None:
        self.rows = grid.cuts_rows
        self.cols = grid.cuts_cols
        self._comm = comm
        self._grid = grid
        self._base = base
        self._index = comm.rank - base
        self._slab = grid.slab(self._index)

    def start(self, padded: Tensor, margins: Margins) -> Callable[[], None]:
        """Begin filling `margins` of `padded` [B, T, rows, columns, C], corners included, all in one round."""
        m = margins
        height = padded.shape[2] - m.top - m.bottom
        width = padded.shape[3] - m.left - m.right
        sends, receives = [], []
        for down, right, index in self._grid.neighbours(self._index):
            rows = inner_edge(m.top, height, m.top, m.bottom, down)
            cols = inner_edge(m.left, width, m.left, m.right, right)
            given = padded[:, :, slice(*rows), slice(*cols)]
            rows = {-1: (0, m.top), 0: rows, 1: (m.top + height, m.top + height + m.bottom)}[down]
            cols = {-1: (0, m.left), 0: cols, 1: (m.left + width, m.left + width + m.right)}[right]
            taken = padded[:, :, slice(*rows), slice(*cols)]
            # A margin on one side only (stride 2) is a message in one direction only.
            if given.numel():
                sends.append((given, self._base + index))
            if taken.numel():
                receives.append((taken, self._base + index))
        return transfer(self._comm, sends, receives)

    def gather(self, slab: Tensor) -> Tensor:
        """Slabs [B, T, h, w, C] to whole frames [B, T, H, W, C] on every rank of the grid."""
        scale = slab.shape[2] // self._slab.height
        b, t, _, _, c = slab.shape
        whole = slab.new_empty(b, t, self._grid.rows[-1][1] * scale, self._grid.cols[-1][1] * scale, c)
        self.own(whole).copy_(slab)
        others = [i for i in range(len(self._grid)) if i != self._index]
        transfer(
            self._comm,
            [(slab, self._base + i) for i in others],
            [(slab_of(whole, self._grid.slab(i), scale, 2), self._base + i) for i in others],
        )()
        return whole

    def own(self, whole: Tensor) -> Tensor:
        """This rank's slab of whole frames [B, T, H, W, C]; a view."""
        return slab_of(whole, self._slab, whole.shape[2] // self._grid.rows[-1][1], 2)


class Collector:
    """Brings the slabs of one result after the other to rank 0 of `comm`. Slab i comes from rank i.

    Ranks go on computing while a result is under way; one at a time, so that memory does not pile up.
    """

    def __init__(self, comm: Comm, grid: Grid) -> None:
        self._comm = comm
        self._grid = grid

    def collected(self, parts: Iterable[Tensor], *, dim: int) -> Iterator[Tensor]:
        """The wholes of which `parts` are this rank's slabs, on the root; nothing elsewhere.

        `dim` has the rows, the next one the columns. A whole is there when the next part has been computed.
        """
        if len(self._grid) == 1:
            yield from parts
            return
        under_way: Callable[[], Tensor | None] | None = None
        for part in parts:
            # The root is ready for one before it waits for the last; for the others that would be a second one.
            begun = self._receive(part, dim) if self._comm.is_root else None
            if under_way is not None:
                whole = under_way()
                if whole is not None:
                    yield whole
            under_way = begun or self._send(part)
        last = None if under_way is None else under_way()
        if last is not None:
            yield last

    def _send(self, part: Tensor) -> Callable[[], None]:
        return transfer(self._comm, [(part, 0)], [])

    def _receive(self, part: Tensor, dim: int) -> Callable[[], Tensor]:
        """Start receiving the others' slabs; the returned call gives the whole."""
        scale = part.shape[dim] // self._grid.slab(0).height
        shape = list(part.shape)
        shape[dim], shape[dim + 1] = self._grid.rows[-1][1] * scale, self._grid.cols[-1][1] * scale
        whole = part.new_empty(shape)
        regions = [slab_of(whole, self._grid.slab(i), scale, dim) for i in range(len(self._grid))]
        arrive = transfer(self._comm, [], [(regions[i], i) for i in range(1, len(regions))])
        regions[0].copy_(part)

        def finish() -> Tensor:
            arrive()
            return whole

        return finish
