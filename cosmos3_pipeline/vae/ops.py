"""The typed ops of a Wan VAE program: computation, halo, temporal cache and cost of each op.

Sizes are relative to the latent grid, so that one op describes every clip. `scale` is the number of rows (and
columns) per latent row. `frames` is the number of frames in a later chunk. The first chunk has one frame
everywhere, because the VAE is causal and treats its first frame as an image. Layout is channels-last:
[B, T, H, W, C].

Follows `diffusers.models.autoencoders.autoencoder_kl_wan`. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from cosmos3_pipeline.vae.blocking import NORM_BLOCK_ELEMENTS, ONE_KERNEL_ELEMENTS, makes_frame_pairs, pair_band

Shape = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class LatentShape:
    """The latent of one call, in either direction: frames, rows and columns of the latent grid.

    `element_bytes` is the size of one element of the VAE's dtype (4 for float32, 2 for bfloat16). A slab with cuts
    within latent rows counts rows and columns in units of 1/`unit` latent row. `on_host` says that a CPU computes,
    whose kernels use smaller blocks than an accelerator's. `picture_bytes` is the size of one value of a decoded
    picture that is sent to rank 0: one byte, unless floats are asked for.
    """

    batch: int
    frames: int
    rows: int
    cols: int
    element_bytes: int = 4
    unit: int = 1
    on_host: bool = True
    picture_bytes: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "frames", "rows", "cols", "element_bytes", "unit"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"the latent's {name} is {getattr(self, name)}; a clip has at least one of each; "
                    f"give {name} >= 1"
                )


@dataclass(frozen=True)
class Margins:
    """Rows above and below, and columns left and right, that an op reads beyond its slab."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    def __bool__(self) -> bool:
        return any((self.top, self.bottom, self.left, self.right))

    def on(self, top: bool, bottom: bool, left: bool, right: bool) -> Margins:
        """The margins on the given sides; 0 on the others."""
        return Margins(self.top * top, self.bottom * bottom, self.left * left, self.right * right)


NO_MARGINS = Margins()
_ALL_AROUND = Margins(1, 1, 1, 1)


class Sides(NamedTuple):
    """Where other tiles lie beside a tile, and how many `others` the picture has."""

    above: bool = False
    below: bool = False
    left: bool = False
    right: bool = False
    others: int = 0

    @property
    def cut_rows(self) -> bool:
        return self.above or self.below

    @property
    def cut_cols(self) -> bool:
        return self.left or self.right

    def sent(self, margins: Margins, frames: int) -> int:
        """The kernels that copy what other tiles read of `frames` frames. `margins`: of the op that reads them."""
        m = margins
        return _strips(
            bool(self.above and m.bottom),
            bool(self.below and m.top),
            bool(self.left and m.right),
            bool(self.right and m.left),
            frames,
        )

    def received(self, margins: Margins, frames: int) -> int:
        """The kernels that copy received `margins` of `frames` frames to their places."""
        m = margins
        return _strips(
            bool(self.above and m.top),
            bool(self.below and m.bottom),
            bool(self.left and m.left),
            bool(self.right and m.right),
            frames,
        )


WHOLE = Sides()


def _strips(above: bool, below: bool, left: bool, right: bool, frames: int) -> int:
    """How many kernels copy a halo on these sides. One kernel copies two parallel rows, columns, or corners.

    Rows and corners of one frame are contiguous, so they are sent and received in place.
    """
    rows, cols = above or below, left or right
    if frames == 1:
        return int(cols)
    corners = left + right if above and below else int(rows and cols)
    return rows + cols + corners


@dataclass(frozen=True)
class Room:
    """The space in a buffer around an activation: frames in front of it, rows and columns around it."""

    front: int = 0
    margins: Margins = NO_MARGINS


NO_ROOM = Room()


@dataclass(frozen=True)
class Weight:
    """One tensor of `AutoencoderKLWan.state_dict()`: its name and shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor between two ops: `channels` at `scale` rows per latent row and `frames` frames per later chunk."""

    channels: int
    scale: int
    frames: int

    def shape(self, latent: LatentShape, *, first: bool) -> Shape:
        """[B, T, H, W, C] of one chunk."""
        return (
            latent.batch,
            1 if first else self.frames,
            latent.rows * self.scale // latent.unit,
            latent.cols * self.scale // latent.unit,
            self.channels,
        )

    def elements(self, latent: LatentShape, *, first: bool) -> int:
        return math.prod(self.shape(latent, first=first))


def conv_weights(
    prefix: str, out_channels: int, in_channels: int, kernel: tuple[int, ...]
) -> tuple[Weight, Weight]:
    """Weight and bias of a convolution."""
    return Weight(f"{prefix}.weight", (out_channels, in_channels, *kernel)), Weight(
        f"{prefix}.bias", (out_channels,)
    )


@dataclass(frozen=True)
class Work:
    """One call of an op: on the tile `latent` of `whole`, for one of the `portions` of a chunk.

    first: whether the chunk is the clip's first chunk.
    """

    latent: LatentShape
    whole: LatentShape
    first: bool
    portions: int

    @property
    def element_bytes(self) -> int:
        return self.whole.element_bytes

    @property
    def cut_rows(self) -> bool:
        """Whether the tile has fewer rows than the picture."""
        return self.latent.rows < self.whole.rows * self.latent.unit

    @property
    def cut_cols(self) -> bool:
        """Whether the tile has fewer columns than the picture."""
        return self.latent.cols < self.whole.cols * self.latent.unit

    def shape(self, spec: TensorSpec, latent: LatentShape | None = None) -> Shape:
        """[B, T, H, W, C] of one portion on the tile, or on another `latent`."""
        b, t, h, w, c = spec.shape(latent or self.latent, first=self.first)
        return b, t // self.portions, h, w, c

    def elements(self, spec: TensorSpec, room: Room = NO_ROOM) -> int:
        """Elements of one portion on the tile, in a buffer with `room`."""
        b, t, h, w, c = self.shape(spec)
        m = room.margins
        return b * (room.front + t) * (m.top + h + m.bottom) * (m.left + w + m.right) * c

    def room(self, op: Op) -> Room:
        """The room that `op` wants around its input."""
        return op.room(first=self.first, cut_rows=self.cut_rows, cut_cols=self.cut_cols)


@dataclass(frozen=True, kw_only=True)
class Op:
    """One step of the program. `name` is the dotted path of its module in `AutoencoderKLWan`.

    takes_room: it needs its input in a buffer with room, and copies it into one unless the previous op did.
    leaves_room: it writes its output into a buffer with the room that the next op wants.
    in_place: its output is its input.
    reads_whole: it reads whole frames, even if it computes only a tile of them.
    memory_passes: how often it reads its input and writes its output. Interleaving and averaging are extra passes.
    Of a norm's passes only the first and the last count, because the others find the data in a cache.
    """

    name: str
    source: TensorSpec
    target: TensorSpec
    weights: tuple[Weight, ...] = ()

    takes_room: ClassVar[bool] = False
    leaves_room: ClassVar[bool] = False
    in_place: ClassVar[bool] = False
    reads_whole: ClassVar[bool] = False
    memory_passes: ClassVar[float] = 1.0

    @property
    def margins(self) -> Margins:
        """How far it reads beyond its slab, in rows and columns of its input. This decides the halo."""
        return NO_MARGINS

    @property
    def cached_frames(self) -> int:
        """The number of frames of its input that it keeps from one chunk for the next."""
        return 0

    def room(self, *, first: bool, cut_rows: bool = False, cut_cols: bool = False) -> Room:
        """The room that it wants around its input: for the kept frames and for margins on sides that are cut.

        At the edge of the picture the convolution itself pads.
        """
        m = self.margins
        top, bottom = (m.top, m.bottom) if cut_rows else (0, 0)
        left, right = (m.left, m.right) if cut_cols else (0, 0)
        return Room(0 if first else self.cached_frames, Margins(top, bottom, left, right))

    @property
    def opens(self) -> TensorSpec | None:
        """The tensor that it keeps for the end of a shortcut, if it opens a shortcut."""
        return None

    @property
    def closes(self) -> bool:
        """Whether it adds the tensor of the innermost shortcut, which is then closed."""
        return False

    @property
    def writes_onto_shortcut(self) -> bool:
        """Whether its output overwrites the tensor of the shortcut that it closes."""
        return False

    def passes(self, *, first: bool) -> bool:
        """Whether the chunk passes through it unchanged, which may be true for the first chunk."""
        return False

    def keeps(self, *, first: bool) -> bool:
        """Whether it keeps frames of this chunk for the next one."""
        return bool(self.cached_frames)

    @property
    def weight_elements(self) -> int:
        """Elements of its weights in a checkpoint."""
        return sum(w.elements for w in self.weights)

    @property
    def folded_elements(self) -> int:
        """Elements that the executor holds beyond `weight_elements`, because it folds its kernel into others."""
        return 0

    @property
    def moves_memory(self) -> bool:
        """Whether it does more than pass on its input."""
        return True

    def weights_read(self, *, first: bool) -> float:
        """The share of its weights that a chunk reads."""
        return 1.0

    def shortcut_elements(self, latent: LatentShape, *, first: bool) -> int:
        """Elements of the shortcut's tensor that it adds while it writes its output."""
        return 0

    def makes_pairs(self, work: Work) -> bool:
        """Whether it computes frames two at a time, with kept frames in a separate tensor."""
        return False

    def scratch_bytes(self, work: Work) -> int:
        """Bytes that it allocates beside its input and output."""
        return 0

    def moved_elements(self, latent: LatentShape, *, first: bool) -> int:
        """Elements that an accelerator reads and writes for it, except in convolutions and matrix products.

        Kept frames are not counted here, see `costs.RECALLED_PASSES`.
        """
        return self.source.elements(latent, first=first) + self.target.elements(latent, first=first)

    def kernels(self, frames: int, elements: float, sides: Sides, *, first: bool) -> int:
        """About how many kernels an accelerator launches for `frames` frames of `elements` values of its input."""
        return 1

    def flops(self, latent: LatentShape, *, first: bool, whole: LatentShape | None = None) -> int:
        """Multiplications and additions of its convolutions and matrix products, in the executor's algorithm.

        latent: the tile.
        whole: the whole latent; None if it is the tile.

        Every tap of every frame counts, although a CPU that makes two frames at a time needs a third fewer.
        """
        return 0

    def dropped_flops(self, latent: LatentShape, *, first: bool) -> int:
        """FLOPs beside `flops`, of outputs on the tile `latent` that the executor computes and drops."""
        return 0

    def _pixels(self, latent: LatentShape, *, first: bool) -> int:
        return math.prod(self.target.shape(latent, first=first)[:4])


@dataclass(frozen=True, kw_only=True)
class Conv(Op):
    """A causal convolution, stride 1, `kernel` = (frames, rows, columns), zero-padded to keep the size.

    A later chunk reads the last `kernel[0] - 1` frames of the previous chunk. On the first chunk these frames are
    zeros, so only the last temporal tap is computed. With `adds_shortcut` it also closes a shortcut whose tensor
    has its output's shape. Both are one op, because the sum is rounded once.
    """

    kernel: tuple[int, int, int]
    adds_shortcut: bool = False

    takes_room: ClassVar[bool] = True

    @property
    def closes(self) -> bool:
        return self.adds_shortcut

    @property
    def writes_onto_shortcut(self) -> bool:
        return self.adds_shortcut

    def weights_read(self, *, first: bool) -> float:
        return 1 / self.kernel[0] if first else 1.0

    def makes_pairs(self, work: Work) -> bool:
        """True in float32 on a CPU, if it is worth it. An accelerator computes all frames at once."""
        b, t, h, w, c = work.shape(self.target)
        pairs = makes_frame_pairs(self.source.channels, c, self.kernel, t, h * w)
        return pairs and b == 1 and work.element_bytes == 4 and work.whole.on_host and not work.first

    def scratch_bytes(self, work: Work) -> int:
        """If it computes two frames at a time: the transformed input, and the two sums that both frames share.

        On an accelerator: the result before it is added to a shortcut.
        """
        if not work.whole.on_host:
            return work.elements(self.target) * work.element_bytes if self.adds_shortcut else 0
        if not self.makes_pairs(work):
            return 0
        _, _, h, w, c = work.shape(self.target)
        m, band = work.room(self).margins, pair_band(self.source.channels, c, self.kernel, h, w)
        above = m.top + m.bottom if band == h else self.kernel[1] - 1
        given = (band + above) * (m.left + w + m.right) * self.source.channels
        return (given + 2 * band * w * c) * work.element_bytes

    def moved_elements(self, latent: LatentShape, *, first: bool) -> int:
        """For a shortcut: during the next norm, the shortcut's tensor is read and the sum is written."""
        return 2 * self.target.elements(latent, first=first) if self.adds_shortcut else 0

    @property
    def margins(self) -> Margins:
        rows, cols = self.kernel[1] // 2, self.kernel[2] // 2
        return Margins(rows, rows, cols, cols)

    @property
    def cached_frames(self) -> int:
        return self.kernel[0] - 1

    def kernels(self, frames: int, elements: float, sides: Sides, *, first: bool) -> int:
        """On a whole picture the norm before it copies the kept frames."""
        kept = (2 - first) * bool(self.cached_frames)
        return 1 + sides.received(self.margins, frames) + kept * bool(sides.others)

    def flops(self, latent: LatentShape, *, first: bool, whole: LatentShape | None = None) -> int:
        taps = math.prod(self.kernel[1:]) * (1 if first else self.kernel[0])
        return 2 * taps * self.source.channels * self.target.channels * self._pixels(latent, first=first)


@dataclass(frozen=True, kw_only=True)
class NormSilu(Op):
    """RMS norm over the channels, then SiLU."""

    leaves_room: ClassVar[bool] = True
    memory_passes: ClassVar[float] = 2.0

    def kernels(self, frames: int, elements: float, sides: Sides, *, first: bool) -> int:
        """On a large tile the rows and columns that others read are computed apart. They are copied to be sent.

        The zeros at the picture's edge, which take another kernel on the outermost tiles, are not counted.
        """
        apart = (elements > ONE_KERNEL_ELEMENTS) * (sides.cut_rows + sides.cut_cols)
        return 1 + apart + sides.sent(_ALL_AROUND, frames)

    def scratch_bytes(self, work: Work) -> int:
        """Float32 bytes of one block of rows or frames on a CPU; an accelerator's kernel needs none."""
        _, t, h, w, c = work.shape(self.source)
        if not work.whole.on_host:
            return 0
        rows = max(1, NORM_BLOCK_ELEMENTS // (w * c))
        rows = rows if rows < h else min(t, rows // h) * h
        return rows * w * c * 4


@dataclass(frozen=True, kw_only=True)
class Attention(Op):
    """Single-head self-attention over the pixels of each frame, with its norm, projections and residual."""

    reads_whole: ClassVar[bool] = True

    def kernels(self, frames: int, elements: float, sides: Sides, *, first: bool) -> int:
        """Its norm, three products, the attention and the sum; on a tile also the copies to gather the frames.

        Rows of one frame are received in place.
        """
        received = sides.others if frames > 1 or sides.cut_cols else 0
        return 6 + bool(sides.others) + received

    def moved_elements(self, latent: LatentShape, *, first: bool) -> int:
        """For the norm, and for the sum with its input."""
        return 5 * self.target.elements(latent, first=first)

    def flops(self, latent: LatentShape, *, first: bool, whole: LatentShape | None = None) -> int:
        b, t, h, w, c = self.source.shape(latent, first=first)
        _, _, height, width, _ = self.source.shape(whole or latent, first=first)
        # Queries are computed for the tile, keys and values for whole frames.
        queries, pixels = h * w, height * width
        return b * t * (4 * (queries + pixels) * c * c + 4 * queries * pixels * c)

    def scratch_bytes(self, work: Work) -> int:
        """The normed input, queries and mixed values of the tile, and keys and values of whole frames.

        If the tile is smaller than the frame, the gathered whole frames are added.
        """
        tile = work.elements(self.target)
        if not (work.cut_rows or work.cut_cols):
            return 5 * tile * work.element_bytes
        return (3 * tile + 3 * math.prod(work.shape(self.target, work.whole))) * work.element_bytes


@dataclass(frozen=True, kw_only=True)
class TimeUp(Op):
    """Doubles the frames: a (3, 1, 1) causal convolution to twice the channels, which become two frames.

    The first chunk passes unchanged, and the next one sees zeros instead of it.
    """

    takes_room: ClassVar[bool] = True
    memory_passes: ClassVar[float] = 4.0

    @property
    def cached_frames(self) -> int:
        return 2

    def passes(self, *, first: bool) -> bool:
        return first

    def keeps(self, *, first: bool) -> bool:
        return not first

    def kernels(self, frames: int, elements: float, sides: Sides, *, first: bool) -> int:
        """Three copies into the buffer and out of it, the convolution, and the interleaving."""
        return 0 if first else 5

    def moved_elements(self, latent: LatentShape, *, first: bool) -> int:
        """For the copy into a buffer with room for kept frames, and for the interleaving of pairs of frames."""
        return 0 if first else 2 * super().moved_elements(latent, first=False)

    def scratch_bytes(self, work: Work) -> int:
        """The pairs of frames before they are interleaved."""
        return work.elements(self.target) * work.element_bytes

    def flops(self, latent: LatentShape, *, first: bool, whole: LatentShape | None = None) -> int:
        if first:
            return 0
        return 2 * 3 * self.source.channels * self.target.channels * self._pixels(latent, first=False)


@dataclass(frozen=True, kw_only=True)
class TimeDown(Op):
    """Halves the frames: a (3, 1, 1) convolution of stride 2 over the last frame of the past and the chunk.

    The first chunk passes unchanged.
    """

    takes_room: ClassVar[bool] = True

    def moved_elements(self, latent: LatentShape, *, first: bool) -> int:
        """For the copy into a buffer with room for the kept frame."""
        return 0 if first else 2 * self.source.elements(latent, first=False)

    @property
    def cached_frames(self) -> int:
        return 1

    def passes(self, *, first: bool) -> bool:
        return first

    def kernels(self, frames: int, elements: float, sides: Sides, *, first: bool) -> int:
        """Copies into the buffer and out of it, and the convolution."""
        return 2 if first else 4

    def flops(self, latent: LatentShape, *, first: bool, whole: LatentShape | None = None) -> int:
        if first:
            return 0
        return 2 * 3 * self.source.channels * self.target.channels * self._pixels(latent, first=False)


@dataclass(frozen=True)
class Duplicates:
    """The addend of a shortcut at an upsampling: each value of `kept` fills `factor_t` x `factor_s`^2 outputs.

    copies: consecutive entries of (channel, time, row, column) that one kept channel fills.
    Source: `DupUp3D`. On the first chunk the first `factor_t - 1` copies in time are dropped.
    """

    kept: TensorSpec
    factor_t: int
    factor_s: int
    copies: int

    @property
    def factor(self) -> int:
        """Outputs of one channel per pixel of `kept`."""
        return self.factor_t * self.factor_s**2


@dataclass(frozen=True, kw_only=True)
class SpatialUp(Op):
    """Nearest-neighbour doubling of rows and columns, then a 3 x 3 convolution.

    The executor computes both at once as four 2 x 2 convolutions of the small picture, one per output parity.
    Their taps are sums of the nine taps. This needs 16 multiplications per small pixel instead of 36.

    With `duplicates` it also closes a shortcut around itself. Both are one op, because adding while the four
    outputs are interleaved saves a pass over memory.
    """

    duplicates: Duplicates | None = None

    takes_room: ClassVar[bool] = True
    memory_passes: ClassVar[float] = 4.0

    def shortcut_elements(self, latent: LatentShape, *, first: bool) -> int:
        return self.duplicates.kept.elements(latent, first=first) if self.duplicates else 0

    def moved_elements(self, latent: LatentShape, *, first: bool) -> int:
        """For the interleaving of the outputs of four convolutions, each with its copy of a kept value."""
        return (3 if self.duplicates else 2) * self.target.elements(latent, first=first)

    @property
    def closes(self) -> bool:
        return self.duplicates is not None

    @property
    def margins(self) -> Margins:
        return _ALL_AROUND

    def kernels(self, frames: int, elements: float, sides: Sides, *, first: bool) -> int:
        """Four convolutions, each with a copy or sum for each frame in time; on a tile also a copy with zeros."""
        copies = 1 if self.duplicates is None or first else self.duplicates.factor_t
        halo = sides.sent(self.margins, frames) + sides.received(self.margins, frames)
        return 4 * (1 + copies) + bool(sides.others) + 2 * (sides.cut_rows + sides.cut_cols) + halo

    def scratch_bytes(self, work: Work) -> int:
        """Bytes of one quarter of the output, and of the values that are added to it if they must be copied.

        The four quarters are the pixels with even or odd rows and columns. They are computed one after another.
        """
        b, t, h, w, _ = work.shape(self.source)
        part = b * t * (h + 1) * (w + 1) * self.target.channels
        added = self.duplicates
        if added is not None and added.factor % added.copies:
            # As many pixels as the activation that the shortcut keeps, with the channels of the output.
            part += work.elements(added.kept) // added.kept.channels * self.target.channels
        return part * work.element_bytes

    @property
    def folded_elements(self) -> int:
        """Four 2 x 2 kernels take the place of one 3 x 3 kernel."""
        return (4 * 4 - 9) * self.source.channels * self.target.channels

    def flops(self, latent: LatentShape, *, first: bool, whole: LatentShape | None = None) -> int:
        return 2 * 4 * self.source.channels * self.target.channels * self._pixels(latent, first=first)

    def dropped_flops(self, latent: LatentShape, *, first: bool) -> int:
        """Each convolution computes a row and a column too many, because it pads both sides alike."""
        b, t, h, w, c = self.source.shape(latent, first=first)
        return 4 * 2 * 4 * c * self.target.channels * b * t * (h + w + 1)


@dataclass(frozen=True, kw_only=True)
class SpatialDown(Op):
    """A 3 x 3 convolution of stride 2 that pads one zero row below and one zero column on the right."""

    takes_room: ClassVar[bool] = True

    @property
    def margins(self) -> Margins:
        return Margins(0, 1, 0, 1)

    def room(self, *, first: bool, cut_rows: bool = False, cut_cols: bool = False) -> Room:
        """Always with margins, because a convolution cannot pad only one side; the zeros are in the buffer."""
        return Room(0, self.margins)

    def kernels(self, frames: int, elements: float, sides: Sides, *, first: bool) -> int:
        """The copy into a buffer with zeros below and on the right, and the convolution."""
        zeros = 2 - sides.below - sides.right
        return 2 + zeros + sides.sent(self.margins, frames) + sides.received(self.margins, frames)

    def moved_elements(self, latent: LatentShape, *, first: bool) -> int:
        """For the copy into a buffer with the zeros."""
        return 2 * self.source.elements(latent, first=first)

    def flops(self, latent: LatentShape, *, first: bool, whole: LatentShape | None = None) -> int:
        return 2 * 9 * self.source.channels * self.target.channels * self._pixels(latent, first=first)


@dataclass(frozen=True, kw_only=True)
class ShortcutBegin(Op):
    """Opens a shortcut: keeps its input, or (with weights) a 1 x 1 x 1 convolution of it, as `kept`."""

    kept: TensorSpec

    takes_room: ClassVar[bool] = True
    in_place: ClassVar[bool] = True

    @property
    def moves_memory(self) -> bool:
        return bool(self.weights)

    @property
    def opens(self) -> TensorSpec:
        return self.kept

    def kernels(self, frames: int, elements: float, sides: Sides, *, first: bool) -> int:
        """The convolution, if it has one."""
        return int(self.moves_memory)

    def moved_elements(self, latent: LatentShape, *, first: bool) -> int:
        """0, because it passes on its input."""
        return 0

    def flops(self, latent: LatentShape, *, first: bool, whole: LatentShape | None = None) -> int:
        if not self.weights:
            return 0
        return 2 * self.source.channels * self.kept.elements(latent, first=first)


@dataclass(frozen=True, kw_only=True)
class AverageDown(Op):
    """Closes a shortcut across a downsampling: adds the mean of the kept values that fall on one output.

    Source: `AvgDown3D`. A chunk with fewer frames than `factor_t` is preceded by zeros.
    """

    kept: TensorSpec
    factor_t: int
    factor_s: int

    in_place: ClassVar[bool] = True
    memory_passes: ClassVar[float] = 3.0

    @property
    def closes(self) -> bool:
        return True

    @property
    def averages(self) -> bool:
        """Whether an output averages more than one value, or takes the value from another place."""
        return self.factor_t * self.factor_s > 1 or self.kept.channels != self.target.channels

    def kernels(self, frames: int, elements: float, sides: Sides, *, first: bool) -> int:
        """The sum, and for means the copy in groups and the means."""
        return 3 if self.averages else 1

    def moved_elements(self, latent: LatentShape, *, first: bool) -> int:
        """For the sum, and for the copy of kept values in groups and their means."""
        kept, target = self.kept.elements(latent, first=first), self.target.elements(latent, first=first)
        return 3 * (kept + target) + target if self.averages else 3 * target

    def scratch_bytes(self, work: Work) -> int:
        """The kept values padded in time, then their copy in groups; the unpadded values are freed by then."""
        if not self.averages:
            return 0
        kept = work.elements(self.kept)
        frames = work.shape(self.kept)[1]
        padded = kept // frames * (frames + -frames % self.factor_t)
        return (2 * padded - kept + work.elements(self.target)) * work.element_bytes


@dataclass(frozen=True, kw_only=True)
class Patchify(Op):
    """Picture [B, 3, T, H, W] to channels-last patches; `patch` pixels a side."""

    patch: int


@dataclass(frozen=True, kw_only=True)
class Unpatchify(Op):
    """Channels-last patches to a picture [B, 3, T, H, W] clamped to [-1, 1]; `patch` pixels a side."""

    patch: int

    def kernels(self, frames: int, elements: float, sides: Sides, *, first: bool) -> int:
        """The copy and the clamping."""
        return 2
