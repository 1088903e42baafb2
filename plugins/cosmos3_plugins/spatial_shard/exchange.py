"""What slabs hand each other while the ops run, and how their results come together on the root."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.vae.executor import Slice, SliceState
from cosmos3_pipeline.vae.ops import Margins
from cosmos3_plugins.spatial_shard.slabs import Grid, Run, Slab, inner_edge, moved

_Part = tuple[slice, slice, int]  # rows and columns of an activation, and the rank that they go to or come from


@dataclass(frozen=True)
class _Halo:
    """What of an activation with margins goes to neighbours, and what comes from them."""

    given: list[_Part]
    taken: list[_Part]


def slab_of(whole: Tensor, slab: Slab, scale: int, dim: int) -> Tensor:
    """The part of `whole` on `slab`: `scale` rows per latent row, rows in `dim`, columns in `dim` + 1."""
    part = slab.at(scale)
    return whole.narrow(dim, part.rows[0], part.height).narrow(dim + 1, part.cols[0], part.width)


def _within(tensor: Tensor, slab: Slab, part: Slab) -> Tensor:
    """`part` of the activation of `slab` [B, T, h, w, C]."""
    top, left = part.rows[0] - slab.rows[0], part.cols[0] - slab.cols[0]
    return tensor[:, :, top : top + part.height, left : left + part.width]


class SlabExchange:
    """The executor's seam for one slab of a grid. Slab i is on rank `base` + i of `comm`.

    Only frames of the current chunk travel: the convolutions keep the margins of their cached frames with them.
    """

    def __init__(self, comm: Comm, grid: Grid, *, base: int = 0) -> None:
        self.rows = grid.cuts_rows
        self.cols = grid.cuts_cols
        self.grid = grid
        self._comm = comm
        self._base = base
        self._index = comm.rank - base
        self._slab = grid.slab(self._index)
        row, col = divmod(self._index, len(grid.cols))
        self._neighbours = (row > 0, row + 1 < len(grid.rows), col > 0, col + 1 < len(grid.cols))
        self._halos: dict[tuple[int, int, Margins], _Halo] = {}

    def coming(self, margins: Margins) -> Margins:
        """Those of `margins` on the sides where this slab has a neighbour."""
        return margins.on(*self._neighbours)

    def start(self, padded: Tensor, margins: Margins) -> Callable[[], None]:
        """Begin filling `margins` of `padded` [B, T, rows, columns, C], corners included, all in one round."""
        size = (padded.shape[2], padded.shape[3], margins)
        halo = self._halos.get(size)
        if halo is None:  # kept, because a halo's journey takes hardly longer than finding out where it begins
            halo = self._halos[size] = self._halo(*size)
        return self._comm.exchange(
            [(padded[:, :, rows, cols], rank) for rows, cols, rank in halo.given],
            [(padded[:, :, rows, cols], rank) for rows, cols, rank in halo.taken],
        ).wait

    def _halo(self, rows: int, cols: int, m: Margins) -> _Halo:
        height, width = rows - m.top - m.bottom, cols - m.left - m.right
        given, taken = list[_Part](), list[_Part]()
        for down, right, index in self.grid.neighbours(self._index):
            peer = self._base + index
            high = inner_edge(m.top, height, m.top, m.bottom, down)
            wide = inner_edge(m.left, width, m.left, m.right, right)
            # A margin on one side only (stride 2) is a message in one direction only.
            if high[0] < high[1] and wide[0] < wide[1]:
                given.append((slice(*high), slice(*wide), peer))
            high = {-1: (0, m.top), 0: high, 1: (m.top + height, rows)}[down]
            wide = {-1: (0, m.left), 0: wide, 1: (m.left + width, cols)}[right]
            if high[0] < high[1] and wide[0] < wide[1]:
                taken.append((slice(*high), slice(*wide), peer))
        return _Halo(given, taken)

    def gather(self, slab: Tensor) -> Tensor:
        """Slabs [B, T, h, w, C] to whole frames [B, T, H, W, C] on every rank of the grid."""
        scale = slab.shape[2] * self._slab.unit // self._slab.height
        b, t, _, _, c = slab.shape
        whole = slab.new_empty(b, t, *self.grid.extent(scale), c)
        slab_of(whole, self._slab, scale, 2).copy_(slab)
        others = [i for i in range(len(self.grid)) if i != self._index]
        self._comm.exchange(
            [(slab, self._base + i) for i in others],
            [(slab_of(whole, self.grid.slab(i), scale, 2), self._base + i) for i in others],
        ).wait()
        return whole

    def dealt(self, part: Tensor, before: Grid, scale: int) -> Tensor:
        """The activation [B, T, h, w, C] on this rank's slab, given that of `before`.

        `scale` of its rows make a latent row.
        """
        old, new = before.slab(self._index).at(scale), self._slab.at(scale)
        b, t, _, _, c = part.shape
        dealt = part.new_empty(b, t, new.height, new.width, c)
        # Going back from this grid to `before`, what would leave is what comes now.
        leaving = moved(before, self.grid, self._index, scale)
        coming = moved(self.grid, before, self._index, scale)
        arriving = self._comm.exchange(
            [(_within(part, old, slab), self._base + other) for other, slab in leaving],
            [(_within(dealt, new, slab), self._base + other) for other, slab in coming],
        )
        kept = old.common(new)
        if kept is not None:
            _within(dealt, new, kept).copy_(_within(part, old, kept))
        arriving.wait()
        return dealt


class SlabRun:
    """The ops of `run` on this rank's slabs; used like the executor's `Slice`, of which it has one a stretch.

    Slab i is on rank `base` + i of `comm`.
    """

    def __init__(self, comm: Comm, slices: Sequence[Slice], run: Run, *, base: int = 0) -> None:
        self.program = slices[0].program
        self.start, self.stop = slices[0].start, slices[-1].stop
        self.run = run
        self._slices = slices
        self._exchanges = [SlabExchange(comm, one.grid, base=base) for one in run.stretches]

    def state(self, chunks: int) -> list[SliceState]:
        """A fresh state for a clip of `chunks` chunks."""
        return [part.state(chunks) for part in self._slices]

    def portions(self, given: Iterable[list[Tensor]], state: list[SliceState]) -> Iterator[list[Tensor]]:
        """As `Slice.portions`, on the slabs of the run."""
        grid = self.run.entering
        for part, own, exchange in zip(self._slices, state, self._exchanges, strict=True):
            if exchange.grid != grid:
                given = self._dealt(given, grid, exchange, self.program.carried(part.start)[0].scale)
                grid = exchange.grid
            given = part.portions(given, own, exchange if len(grid) > 1 else None)
        yield from given

    @staticmethod
    def _dealt(
        given: Iterable[list[Tensor]], before: Grid, exchange: SlabExchange, scale: int
    ) -> Iterator[list[Tensor]]:
        for tensors in given:
            # Nothing here may keep the tensors alive while the next ops run.
            tensors.append(exchange.dealt(tensors.pop(), before, scale))
            yield tensors


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
        return self._comm.exchange([(part, 0)]).wait

    def _receive(self, part: Tensor, dim: int) -> Callable[[], Tensor]:
        """Start receiving the others' slabs; the returned call gives the whole."""
        scale = part.shape[dim] * self._grid.unit // self._grid.slab(0).height
        shape = list(part.shape)
        shape[dim : dim + 2] = self._grid.extent(scale)
        whole = part.new_empty(shape)
        regions = [slab_of(whole, self._grid.slab(i), scale, dim) for i in range(len(self._grid))]
        arriving = self._comm.exchange(receives=[(regions[i], i) for i in range(1, len(regions))])
        regions[0].copy_(part)

        def finish() -> Tensor:
            arriving.wait()
            return whole

        return finish
