"""The typed ops of a Wan VAE program: what each computes, needs from its neighbours, remembers and costs.

Sizes are relative to the latent grid, so that one op describes every clip: `scale` is rows (and columns) per
latent row, `frames` the frames of a later chunk (the first chunk has one frame everywhere, because the VAE is
causal and treats its first frame as an image). Layout is channels-last: [B, T, H, W, C].

Follows `diffusers.models.autoencoders.autoencoder_kl_wan`; no torch here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Shape = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class LatentShape:
    """The latent of one call, in either direction: frames, rows and columns of the latent grid.

    `element_bytes` is the size of one element of the VAE's dtype (4 for float32, 2 for bfloat16). A slab of a
    picture that was cut between latent rows counts its rows and columns in parts of one, `unit` of which make one.
    """

    batch: int
    frames: int
    rows: int
    cols: int
    element_bytes: int = 4
    unit: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "frames", "rows", "cols", "element_bytes", "unit"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"the latent's {name} is {getattr(self, name)}; a clip has at least one of each; "
                    f"give {name} >= 1"
                )


@dataclass(frozen=True)
class Margins:
    """Rows above and below, and columns left and right, that an op reads beyond its own slab."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    def __bool__(self) -> bool:
        return any((self.top, self.bottom, self.left, self.right))

    def on(self, top: bool, bottom: bool, left: bool, right: bool) -> Margins:
        """Those on some of the sides."""
        return Margins(self.top * top, self.bottom * bottom, self.left * left, self.right * right)


NO_MARGINS = Margins()


@dataclass(frozen=True)
class Room:
    """Frames before, and rows and columns around, an activation inside its buffer."""

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


@dataclass(frozen=True, kw_only=True)
class Op:
    """One step of the program. `name` is the dotted path of its module in `AutoencoderKLWan`."""

    name: str
    source: TensorSpec
    target: TensorSpec
    weights: tuple[Weight, ...] = ()

    @property
    def margins(self) -> Margins:
        """What it reads beyond its slab, in rows and columns of its input."""
        return NO_MARGINS

    @property
    def cached_frames(self) -> int:
        """Frames of its input that it keeps from one chunk for the next."""
        return 0

    def room(self, *, first: bool, cut_rows: bool = False, cut_cols: bool = False) -> Room:
        """The room that it wants around its input: for the kept frames and for margins on sides that are cut.

        At the edge of the picture the convolution pads by itself.
        """
        m = self.margins
        top, bottom = (m.top, m.bottom) if cut_rows else (0, 0)
        left, right = (m.left, m.right) if cut_cols else (0, 0)
        return Room(0 if first else self.cached_frames, Margins(top, bottom, left, right))

    @property
    def opens(self) -> TensorSpec | None:
        """What it keeps for the end of a shortcut, if it opens one."""
        return None

    @property
    def closes(self) -> bool:
        """Whether it adds what the shortcut opened last has kept."""
        return False

    @property
    def weight_elements(self) -> int:
        return sum(w.elements for w in self.weights)

    def flops(self, latent: LatentShape, *, first: bool) -> int:
        """Multiplications and additions of its convolutions and matrix products as the executor does them.

        But every tap of every frame counts, also where a CPU makes two frames with a third fewer.
        """
        return 0

    def module_flops(self, latent: LatentShape, *, first: bool) -> int:
        """The same as `AutoencoderKLWan` does them: never less, because it multiplies zeros too."""
        return self.flops(latent, first=first)

    def _pixels(self, latent: LatentShape, *, first: bool) -> int:
        return math.prod(self.target.shape(latent, first=first)[:4])


@dataclass(frozen=True, kw_only=True)
class Conv(Op):
    """A causal convolution, stride 1, `kernel` = (frames, rows, columns), zero-padded to keep the size.

    A later chunk reads the last `kernel[0] - 1` frames of the chunk before. On the first chunk those are zeros,
    so only the last temporal tap is computed. With `adds_shortcut` it closes a shortcut whose kept tensor has its
    output's shape; one op, because the sum is rounded once.
    """

    kernel: tuple[int, int, int]
    adds_shortcut: bool = False

    @property
    def closes(self) -> bool:
        return self.adds_shortcut

    @property
    def margins(self) -> Margins:
        rows, cols = self.kernel[1] // 2, self.kernel[2] // 2
        return Margins(rows, rows, cols, cols)

    @property
    def cached_frames(self) -> int:
        return self.kernel[0] - 1

    def flops(self, latent: LatentShape, *, first: bool) -> int:
        taps = math.prod(self.kernel[1:]) * (1 if first else self.kernel[0])
        return 2 * taps * self.source.channels * self.target.channels * self._pixels(latent, first=first)

    def module_flops(self, latent: LatentShape, *, first: bool) -> int:
        taps = math.prod(self.kernel)
        return 2 * taps * self.source.channels * self.target.channels * self._pixels(latent, first=first)


@dataclass(frozen=True, kw_only=True)
class NormSilu(Op):
    """RMS norm over the channels, then SiLU."""


@dataclass(frozen=True, kw_only=True)
class Attention(Op):
    """Single-head self-attention over the pixels of each frame, with its norm, projections and residual."""

    def flops(self, latent: LatentShape, *, first: bool) -> int:
        b, t, h, w, _ = self.source.shape(latent, first=first)
        return b * t * self.frame_flops(h * w, h * w)

    def frame_flops(self, queries: int, pixels: int) -> int:
        """Of one frame of so many `pixels`, for `queries` of them; keys and values are those of all."""
        c = self.source.channels
        return 4 * (queries + pixels) * c * c + 4 * queries * pixels * c


@dataclass(frozen=True, kw_only=True)
class TimeUp(Op):
    """Doubles the frames: a (3, 1, 1) causal convolution to twice the channels, which become two frames.

    The first chunk passes unchanged, and the next one sees zeros instead of it.
    """

    @property
    def cached_frames(self) -> int:
        return 2

    def flops(self, latent: LatentShape, *, first: bool) -> int:
        if first:
            return 0
        return 2 * 3 * self.source.channels * self.target.channels * self._pixels(latent, first=False)


@dataclass(frozen=True, kw_only=True)
class TimeDown(Op):
    """Halves the frames: a (3, 1, 1) convolution of stride 2 over the last frame before and the chunk.

    The first chunk passes unchanged.
    """

    @property
    def cached_frames(self) -> int:
        return 1

    def flops(self, latent: LatentShape, *, first: bool) -> int:
        if first:
            return 0
        return 2 * 3 * self.source.channels * self.target.channels * self._pixels(latent, first=False)


@dataclass(frozen=True)
class Duplicates:
    """What a shortcut adds to an upsampling: each value of `kept` copied over `factor_t` x `factor_s`^2 outputs.

    copies: consecutive entries of (channel, time, row, column) that one kept channel fills.
    Source: `DupUp3D`. On the first chunk the first `factor_t - 1` copies in time are dropped.
    """

    kept: TensorSpec
    factor_t: int
    factor_s: int
    copies: int

    @property
    def factor(self) -> int:
        """Outputs of one channel that fall on one place of the kept grid."""
        return self.factor_t * self.factor_s**2


@dataclass(frozen=True, kw_only=True)
class SpatialUp(Op):
    """Nearest-neighbour doubling of rows and columns, then a 3 x 3 convolution.

    The executor does both at once as four 2 x 2 convolutions of the small picture, one per output parity, whose
    taps are sums of the nine: 16 multiplications per small pixel instead of 36.

    With `duplicates` it closes a shortcut across itself; one op, because adding while the four are interleaved
    saves a way through memory.
    """

    duplicates: Duplicates | None = None

    @property
    def closes(self) -> bool:
        return self.duplicates is not None

    @property
    def margins(self) -> Margins:
        return Margins(1, 1, 1, 1)

    def flops(self, latent: LatentShape, *, first: bool) -> int:
        return 2 * 4 * self.source.channels * self.target.channels * self._pixels(latent, first=first)

    def module_flops(self, latent: LatentShape, *, first: bool) -> int:
        return 2 * 9 * self.source.channels * self.target.channels * self._pixels(latent, first=first)


@dataclass(frozen=True, kw_only=True)
class SpatialDown(Op):
    """A 3 x 3 convolution of stride 2 that pads one zero row below and one zero column on the right."""

    @property
    def margins(self) -> Margins:
        return Margins(0, 1, 0, 1)

    def room(self, *, first: bool, cut_rows: bool = False, cut_cols: bool = False) -> Room:
        """Always the margins: a convolution cannot pad one side only, so the zeros are in the buffer."""
        return Room(0, self.margins)

    def flops(self, latent: LatentShape, *, first: bool) -> int:
        return 2 * 9 * self.source.channels * self.target.channels * self._pixels(latent, first=first)


@dataclass(frozen=True, kw_only=True)
class ShortcutBegin(Op):
    """Opens a shortcut: keeps its input, or (with weights) a 1 x 1 x 1 convolution of it, as `kept`."""

    kept: TensorSpec

    @property
    def opens(self) -> TensorSpec:
        return self.kept

    def flops(self, latent: LatentShape, *, first: bool) -> int:
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

    @property
    def closes(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class Patchify(Op):
    """Picture [B, 3, T, H, W] to channels-last patches; `patch` pixels a side."""

    patch: int


@dataclass(frozen=True, kw_only=True)
class Unpatchify(Op):
    """Channels-last patches to a picture [B, 3, T, H, W] clamped to [-1, 1]; `patch` pixels a side."""

    patch: int
