"""How much memory a slice of the program needs beyond its weights, by walking through it as the executor does.

Counts the tensors that are alive at once: the activation, the open shortcuts, the frames kept between chunks, and
what each op allocates. Not counted: what a convolution library keeps for itself. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from cosmos3_pipeline.vae.ops import (
    NO_ROOM,
    Attention,
    AverageDown,
    Conv,
    LatentShape,
    NormSilu,
    Op,
    Patchify,
    Room,
    Shape,
    ShortcutBegin,
    SpatialUp,
    TensorSpec,
    TimeDown,
    TimeUp,
    Unpatchify,
)
from cosmos3_pipeline.vae.program import Program

# Float32 elements that the fused norm and activation works on at once: half a megabyte, so that its passes stay in
# a core's second-level cache.
NORM_BLOCK_ELEMENTS = 1 << 17
# From so many FLOPs for two frames of its output on, and so many pixels of a frame, a convolution makes two at a
# time. With less, four calls cost more than the arithmetic that they save; with fewer pixels its time is that of
# reading weights, of which there are a third more. Timed with 12 to 1024 channels.
_PAIR_FLOPS = 150_000_000
_PAIR_PIXELS = 48
# Elements of a band of a frame, of its input or output, that a pair is made of at once: a megabyte, so that sums
# and differences stay in a cache. Kernels of more weights than this would be read too often.
_BAND_ELEMENTS = 1 << 18
_BAND_WEIGHTS = 1 << 17

NO_DEALS: Mapping[int, LatentShape] = MappingProxyType({})


def makes_frame_pairs(inputs: int, outputs: int, kernel: tuple[int, int, int], frames: int, pixels: int) -> bool:
    """Whether a convolution of `inputs` to `outputs` channels makes its `frames` of `pixels` two at a time.

    So it is in float32 on CPU, for a clip by itself (`convolution.py`), with a third fewer multiplications.
    """
    taps, rows, cols = kernel
    flops = 4 * inputs * outputs * taps * rows * cols * pixels
    enough = flops >= _PAIR_FLOPS and pixels >= _PAIR_PIXELS
    return taps == 3 and rows * cols > 1 and frames > 0 and frames % 2 == 0 and enough


def pair_band(inputs: int, outputs: int, kernel: tuple[int, int, int], rows: int, cols: int) -> int:
    """How many of the `rows` of a pair of frames are made at once; the last band may have fewer."""
    _, height, width = kernel
    most = max(1, _BAND_ELEMENTS // (cols * max(inputs, outputs)))
    if inputs * outputs * height * width > _BAND_WEIGHTS or most >= rows:
        return rows
    return math.ceil(rows / math.ceil(rows / most))


def activation_bytes(
    program: Program,
    latent: LatentShape,
    start: int = 0,
    stop: int | None = None,
    *,
    cut_rows: bool = False,
    cut_cols: bool = False,
    deals: Mapping[int, LatentShape] = NO_DEALS,
    whole: LatentShape | None = None,
) -> int:
    """Peak bytes beyond the weights while the ops [start, stop) run over a clip, portion by portion.

    `latent` is the slab that is run: with `cut_rows` or `cut_cols` its ops also hold the neighbours' margins.
    `deals`: from which ops on another slab is run instead, which is copied together from what was there. `whole`:
    of which it is a slab, so that attention gathers its frames.
    """
    stop = len(program) if stop is None else stop
    chunks = program.chunks(latent)
    walk = _Walk(program, latent, start, stop, deals, whole, cut_rows=cut_rows, cut_cols=cut_cols)
    peak = walk.chunk(first=True, last=chunks == 1)
    if chunks > 1:
        # The frames kept by the ops already run are replaced by as many, so the third chunk is like the second.
        peak = max(peak, walk.chunk(first=False, last=False))
    return peak


class _Walk:
    """The state of a slice between chunks, in bytes."""

    def __init__(
        self,
        program: Program,
        latent: LatentShape,
        start: int,
        stop: int,
        deals: Mapping[int, LatentShape],
        whole: LatentShape | None,
        *,
        cut_rows: bool,
        cut_cols: bool,
    ) -> None:
        self._program = program
        self._latent = latent
        self._deals = {start: latent, **deals}
        self._whole = whole
        self._start = start
        self._ops = program.ops[start:stop]
        self._cuts = {"cut_rows": cut_rows, "cut_cols": cut_cols}
        self._kept: dict[str, int] = {}

    def chunk(self, *, first: bool, last: bool) -> int:
        """Run one chunk; returns its peak in bytes."""
        self._first, self._last = first, last
        program, start = self._program, self._start
        early = max(0, program.portions_from - start)
        parts = program.portions_at(start + len(self._ops), first=first)
        if parts == 1 or start > program.portions_from:
            # Whole throughout, or given in portions; but for the frames kept, the second is like the first.
            self._parts = parts
            return max(self._through(self._ops, start) for _ in range(parts))
        self._parts = 1
        peak = self._through(self._ops[:early], start) if early else 0
        spec = program.carried(start + early)[0]
        if early:
            peak = max(peak, self._moved(start + early, self._size(spec)))
        self._latent = self._slab(start + early)
        chunk = self._size(spec)
        self._parts = parts
        # While the portions but the last are worked on, the chunk of which they are parts is alive.
        portion = chunk // parts
        held = (chunk - portion) * self._latent.element_bytes
        peak = max(peak, self._through(self._ops[early:], start + early) + held)
        return max(peak, self._through(self._ops[early:], start + early))

    def _slab(self, number: int) -> LatentShape:
        """The slab that op `number` runs on."""
        return self._deals[max(start for start in self._deals if start <= number)]

    def _moved(self, number: int, given: int) -> int:
        """Bytes alive while `given` elements of the slab before are copied together to that of op `number`."""
        before, self._latent = self._latent, self._slab(number)
        if self._latent == before:
            return 0
        return self._alive([[given], [self._size(self._program.ops[number].source)]])

    def _through(self, ops: Sequence[Op], start: int) -> int:
        """Run one portion through `ops`, the first of which is op `start`; returns its peak in bytes."""
        self._latent = self._slab(start)
        element = self._latent.element_bytes
        # Tensors are told apart by identity, because an identity shortcut shares its tensor with the activation.
        at = [self._size(self._program.carried(start)[0])]
        room = NO_ROOM
        kept_before = [[self._size(spec)] for spec in self._program.carried(start)[1:]]
        shortcuts = [kept_before[which] for which in self._program.shortcuts(start)]
        peak = 0
        for number, (op, following) in enumerate(zip(ops, [*ops[1:], None], strict=True), start):
            if number in self._deals and number > start:
                peak = max(peak, self._moved(number, at[0]))
                at = [self._size(op.source)]
            alive = [at, *shortcuts]
            wanted = self._room(op)
            takes = (op.weights and not isinstance(op, NormSilu | Attention)) or isinstance(op, ShortcutBegin)
            passes = self._first and isinstance(op, TimeUp | TimeDown)
            if takes and room != wanted and not (passes and isinstance(op, TimeUp)):
                at = [self._size(op.source, wanted)]
                peak = max(peak, self._alive([*alive, at]))
                room = wanted
                alive = [at, *shortcuts]
            self._remember(op, passes=passes)
            room_after = NO_ROOM if following is None else self._room(following)
            closed = shortcuts[-1] if op.closes else None
            if op.closes:
                shortcuts = shortcuts[:-1]
            if passes:
                room_after, out, scratch = room, at, 0
            elif isinstance(op, NormSilu):
                out, scratch = [self._size(op.target, room_after)], self._norm_scratch(op) // element
            elif isinstance(op, ShortcutBegin):
                kept = [self._size(op.kept)] if op.weights else at
                shortcuts = [*shortcuts, kept]
                room_after, out, scratch = NO_ROOM, at, 0
                alive = [at, *shortcuts]
            elif isinstance(op, AverageDown):
                room_after, out, scratch = room, at, self._average_scratch(op)
            elif isinstance(op, Conv) and closed is not None and all(closed is not outer for outer in shortcuts):
                # A convolution adds onto what was kept.
                room_after, out, scratch = NO_ROOM, closed, self._scratch(op)
            else:
                room_after, out, scratch = NO_ROOM, [self._size(op.target)], self._scratch(op)
            peak = max(peak, self._alive([*alive, out]) + scratch * element)
            at, room = out, room_after
        return peak

    def _room(self, op: Op) -> Room:
        room = op.room(first=self._first, **self._cuts)
        # Pairs are made of kept frames where these are.
        return Room(0, room.margins) if isinstance(op, Conv) and self._makes_pairs(op) else room

    def _makes_pairs(self, op: Conv) -> bool:
        """In float32 as on a CPU; accelerators are for bfloat16, and make all frames at once."""
        b, t, h, w, c = self._shape(op.target)
        pairs = makes_frame_pairs(op.source.channels, c, op.kernel, t, h * w)
        return pairs and b == 1 and self._latent.element_bytes == 4 and not self._first

    def _shape(self, spec: TensorSpec) -> Shape:
        b, t, h, w, c = spec.shape(self._latent, first=self._first)
        return b, t // self._parts, h, w, c

    def _size(self, spec: TensorSpec, room: Room = NO_ROOM) -> int:
        b, t, h, w, c = self._shape(spec)
        m = room.margins
        return b * (room.front + t) * (m.top + h + m.bottom) * (m.left + w + m.right) * c

    def _alive(self, tensors: list[list[int]]) -> int:
        """Bytes of distinct tensors and of the frames kept."""
        distinct = {id(t): t[0] for t in tensors}
        return (sum(distinct.values()) + sum(self._kept.values())) * self._latent.element_bytes

    def _remember(self, op: Op, *, passes: bool) -> None:
        if not op.cached_frames or (passes and isinstance(op, TimeUp)):
            return
        if self._last:
            self._kept.pop(op.name, None)
            return
        room = self._room(op)
        b, _, h, w, c = op.source.shape(self._latent, first=True)
        m = room.margins
        self._kept[op.name] = b * op.cached_frames * (m.top + h + m.bottom) * (m.left + w + m.right) * c

    def _norm_scratch(self, op: Op) -> int:
        """Float32 bytes of one block of rows or frames; twice where the input must be widened first."""
        _, t, h, w, c = self._shape(op.source)
        rows = max(1, NORM_BLOCK_ELEMENTS // (w * c))
        rows = rows if rows < h else min(t, rows // h) * h
        return rows * w * c * 4 * (1 if self._latent.element_bytes == 4 else 2)

    def _average_scratch(self, op: AverageDown) -> int:
        """The kept values padded in time, then their copy in groups; the unpadded ones are gone by then."""
        kept = self._size(op.kept)
        _, t, *_ = self._shape(op.kept)
        padded = kept // t * (t + -t % op.factor_t)
        return 2 * padded - kept + self._size(op.target)

    def _scratch(self, op: Op) -> int:
        """Elements that an op allocates beside its input and output."""
        target = self._size(op.target)
        if isinstance(op, TimeUp):
            return target  # the pairs of frames before they are interleaved
        if isinstance(op, SpatialUp):
            b, t, h, w, _ = self._shape(op.source)
            part = b * t * (h + 1) * (w + 1) * op.target.channels
            added = op.duplicates
            if added is None or added.factor % added.copies == 0:
                return part  # what is added are views
            # One offset of the upsampled grid at a time: the kept grid with the output's channels.
            return part + self._size(added.kept) // added.kept.channels * op.target.channels
        if isinstance(op, Attention):
            # The normed input, queries and mixed values of the slab; keys and values of whole frames, which are
            # gathered if they are more than the slab.
            if self._whole is None:
                return 5 * target
            frames = op.target.elements(self._whole, first=self._first) // self._parts
            return 3 * target + 3 * frames
        if isinstance(op, Unpatchify | Patchify):
            return 0
        if isinstance(op, Conv):
            return self._pair_scratch(op)
        assert isinstance(op, TimeDown) or op.weights
        return 0

    def _pair_scratch(self, op: Conv) -> int:
        """What is convolved, and what both frames have in common, where a convolution makes two at a time."""
        if not self._makes_pairs(op):
            return 0
        _, _, h, w, c = self._shape(op.target)
        m, band = self._room(op).margins, pair_band(op.source.channels, c, op.kernel, h, w)
        above = m.top + m.bottom if band == h else op.kernel[1] - 1
        given = (band + above) * (m.left + w + m.right) * op.source.channels
        return given + 2 * band * w * c
