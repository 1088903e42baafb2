"""Convolution with its weights bound; the only place that chooses kernels for it.

Every strategy and the replicated reference use this class. A faster kernel therefore changes all of them alike,
and their outputs stay comparable bit for bit. Activations are channels-last and contiguous: [B, T, H, W, C].

On CPUs this class calls oneDNN directly with weights that were reordered once. PyTorch itself uses a slow kernel
for small inputs, and reorders the weights at every call. In float32 this class computes two frames with four
convolutions of one frame each instead of six:

    y0 = w0 x0 + w1 x1 + w2 x2        y1 = w0 x1 + w1 x2 + w2 x3
    a = (w0 + w1 + w2) / 2 (x1 + x2)  b = (w0 - w1 + w2) / 2 (x2 - x1)
    y0 = a + b + w0 (x0 - x2)         y1 = a - b + w2 (x3 - x1)

(Winograd's F(2, 3); Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015). Its error against
float64 was 0.7 to 1.4 times the error of the plain convolution. bfloat16 does not use this method, because the
sums of frames and of weights would be rounded too. A processor without instructions for bfloat16 computes in
float32, in bands of rows, and rounds the result once. The reordered weights then take four bytes each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos3_pipeline.distributed.host_path import takes_host_path
from cosmos3_pipeline.vae.blocking import makes_frame_pairs, pair_band
from cosmos3_pipeline.vae.frames import Arrival
from cosmos3_pipeline.vae.host_memory import long_lived
from cosmos3_pipeline.vae.kernels import arithmetic_dtype
from cosmos3_pipeline.vae.ops import Margins

# A clip has two input shapes: the first chunk's, and the later chunks'.
_SHAPES = 2

# A band that is computed in a wider dtype has about _WIDE_ELEMENTS elements, but not fewer than _WIDE_BY_WEIGHTS
# elements per weight, because each band reads all weights.
_WIDE_ELEMENTS = 1 << 16
_WIDE_BY_WEIGHTS = 1

# The weights that are reordered: all taps, the first or last tap, or the two sums of taps that both frames of a
# pair use.
_WHOLE, _FIRST, _LAST, _SUM, _DIFFERENCE = "whole", "first", "last", "sum", "difference"
_OF_PAIRS = (_FIRST, _SUM, _DIFFERENCE, _LAST)

_Key = tuple[str, tuple[int, ...]]  # one of the names above, and the shape [B, C, T, H, W] of the input frames


class Convolution:
    """A 3D convolution over channels-last activations, its weights bound and reordered on first use.

    `weight` is [O, I, kt, kh, kw], `bias` [O]. The weight is dropped once its reordered forms can restore it.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._shape = tuple(weight.shape)
        if not takes_host_path(weight):
            # cuDNN would otherwise reorder the weight at every call. The last tap alone would need another copy;
            # it is made in the call that needs it, which is once per clip.
            weight = weight.contiguous(memory_format=torch.channels_last_3d)
        self._given: Tensor | None = weight
        self._middle: Tensor | None = None  # the middle tap, kept beside the reordered first and last
        self._bias = bias
        self._dtype = arithmetic_dtype(weight.dtype, weight.device)
        self._packed: dict[_Key, Tensor] = {}
        self._used: list[list[_Key]] = []  # for each shape, the most recently used last

    def makes_pairs(self, shape: Sequence[int], like: Tensor) -> bool:
        """Whether it computes frames two at a time, for an input like `like` of `shape` [B, T, H, W, I].

        It then takes the past frames as a separate tensor.
        """
        batch, frames, rows, cols, _ = shape
        outputs, inputs, *kernel = self._shape
        return (
            _onednn(like)
            and like.dtype == torch.float32
            and batch == 1
            and makes_frame_pairs(inputs, outputs, (kernel[0], kernel[1], kernel[2]), frames, rows * cols)
        )

    def __call__(
        self,
        x: Tensor,
        *,
        before: Tensor | None = None,
        padding: tuple[int, int] = (0, 0),
        stride: tuple[int, int, int] = (1, 1, 1),
        taps: int = 0,
        onto: Tensor | None = None,
        arrival: Arrival | None = None,
    ) -> Tensor:
        """[B, T, H, W, I] -> [B, T', H', W', O]; `padding` adds zero rows and columns on both sides.

        before: the past frames, if frames are computed in pairs (`makes_pairs`); this saves a copy. Otherwise the
        past frames are the first frames of x.
        taps: if positive, only the last `taps` temporal taps are computed, which is right if the past is zeros.
        onto: [B, T', H', W', O], contiguous. The result is added to it, and oneDNN rounds the sum once.
        arrival: the halo of x that is still in flight. It is waited for as late as possible.
        """
        if before is not None:
            assert not taps and stride == (1, 1, 1), "pairs of frames are made with all taps, and of every frame"
            return self._in_pairs(before, x, padding, onto, arrival)
        taps = taps or self._shape[2]
        if arrival is not None:
            arrival.wait()
        pad = (0, *padding)
        frames = x.permute(0, 4, 1, 2, 3)
        if not _onednn(x):
            out = F.conv3d(frames, self._weight()[:, :, -taps:], self._bias, stride=stride, padding=pad)
            out = _channels_last(out)
            return out if onto is None else onto.add_(out)
        if self._dtype != x.dtype:
            return self._widened(x, padding, stride, taps, onto)
        (packed,) = self._pack([_WHOLE if taps == self._shape[2] else _LAST], tuple(frames.shape), pad, stride)
        if onto is None:
            return _convolved(x, packed, self._bias, pad, stride)
        # oneDNN adds while the values are in a cache, and no memory is needed for another tensor.
        _convolved_onto(onto, x, packed, self._bias, pad, stride)
        return onto

    def _widened(
        self,
        x: Tensor,
        padding: tuple[int, int],
        stride: tuple[int, int, int],
        taps: int,
        onto: Tensor | None,
    ) -> Tensor:
        """As `__call__`, in a wider dtype than x has. Bands of rows keep the memory for the wide copies small."""
        outputs, inputs, all_taps, height, width = self._shape
        batch, frames, rows, cols, _ = x.shape
        kernel, edges = (taps, height, width), (0, *padding)
        made = [
            (n + 2 * edge - k) // step + 1
            for n, edge, k, step in zip((frames, rows, cols), edges, kernel, stride, strict=True)
        ]
        out = x.new_empty(batch, *made, outputs) if onto is None else onto
        most = max(_WIDE_ELEMENTS, _WIDE_BY_WEIGHTS * inputs * outputs * taps * height * width)
        size = max(1, most // (batch * frames * stride[1] * cols * inputs))
        size = math.ceil(made[1] / math.ceil(made[1] / size))
        pad, read = (0, 0, padding[1]), (size - 1) * stride[1] + height
        space = x.new_empty(batch, frames, read, cols, inputs, dtype=self._dtype)
        name = _WHOLE if taps == all_taps else _LAST
        (packed,) = self._pack([name], tuple(space.permute(0, 4, 1, 2, 3).shape), pad, stride)
        for top in range(0, made[1], size):
            band = _band(top, min(top + size, made[1]), height, padding[0], stride[1])
            given, there, inner = _framed(space, band, rows)
            inner.copy_(x[:, :, there])
            wide = _convolved(given, packed, self._bias.to(self._dtype), pad, stride)
            target = out[:, :, band.made]
            target.copy_(wide if onto is None else wide.add_(target))
        return out

    def _in_pairs(
        self,
        before: Tensor,
        x: Tensor,
        padding: tuple[int, int],
        onto: Tensor | None,
        arrival: Arrival | None,
    ) -> Tensor:
        """As `__call__`, two frames at a time, in bands of rows whose sums and differences stay in a cache."""
        outputs, inputs, taps, height, width = self._shape
        rows, cols = x.shape[2] + 2 * padding[0] - height + 1, x.shape[3] + 2 * padding[1] - width + 1
        out = x.new_empty(1, x.shape[1], rows, cols, outputs) if onto is None else onto
        size = pair_band(inputs, outputs, (taps, height, width), rows, cols)
        pad, read = (0, *padding), x.shape[2]
        if size < rows:
            pad, read = (0, 0, padding[1]), size + height - 1  # `space` has the zero rows at the picture's edge
        space = x.new_empty(1, 1, read, *x.shape[3:])
        packed = self._pack(_OF_PAIRS, tuple(space.permute(0, 4, 1, 2, 3).shape), pad, (1, 1, 1))
        pairs = _Pairs((before, x), out, onto is not None, space, packed, self._bias, pad)
        bands = [_Band(slice(0, rows), slice(0, x.shape[2]))]
        if size < rows:
            bands = [_band(top, min(top + size, rows), height, padding[0]) for top in range(0, rows, size)]
        # Bands that need no halo are computed before the rank waits for it.
        early = [band for band in bands if arrival is not None and _is_within(band, x, arrival.margins)]
        for band in early:
            pairs.make(band)
        if arrival is not None:
            arrival.wait()
        for band in bands:
            if band not in early:
                pairs.make(band)
        return out

    def _pack(
        self,
        names: Sequence[str],
        frames: tuple[int, ...],
        pad: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> list[Tensor]:
        """The parts `names` of the weight, in the memory order that oneDNN wants for frames of this shape.

        The best order depends on the shape, and oneDNN reorders weights at every call that gets another order.
        Therefore the reordered weights are kept for the most recently used shapes.
        """
        keys = [(name, frames) for name in names]
        if keys not in self._used:
            reorder: Any = torch._C._nn.mkldnn_reorder_conv3d_weight
            with long_lived():
                weight = self._weight()
                for name in names:
                    if (name, frames) not in self._packed:
                        part = _part(weight, name).to(self._dtype).contiguous().to_mkldnn()
                        self._packed[name, frames] = reorder(part, pad, stride, (1, 1, 1), 1, list(frames))
                self._used.append(keys)
                self._let_go(weight)
        elif self._used[-1] != keys:
            self._used.append(self._used.pop(self._used.index(keys)))  # the most recently used is last
        return [self._packed[key] for key in keys]

    def _let_go(self, weight: Tensor) -> None:
        """Drop reordered parts of shapes not used lately, and `weight` itself if the others can restore it."""
        whole = [keys for keys in self._used if _has_all(keys)]
        self._used = self._used[-_SHAPES:]
        if whole and whole[-1] not in self._used:
            self._used[0] = whole[-1]
        self._packed = {key: self._packed[key] for keys in self._used for key in keys}
        self._given = None if whole else weight
        if not whole or _WHOLE in {name for name, _ in self._packed}:
            self._middle = None
        elif self._middle is None:
            self._middle = weight[:, :, 1:2].contiguous().to_mkldnn()

    def _weight(self) -> Tensor:
        if self._given is not None:
            return self._given
        held = {name: packed for (name, _), packed in self._packed.items()}
        if _WHOLE in held:
            return held[_WHOLE].to_dense()
        assert self._middle is not None
        return torch.cat([held[_FIRST].to_dense(), self._middle.to_dense(), held[_LAST].to_dense()], dim=2)


def _has_all(keys: list[_Key]) -> bool:
    """Whether the whole weight can be restored from the parts `keys` and the middle tap."""
    return len(keys) > 1 or keys[0][0] == _WHOLE


def _part(weight: Tensor, name: str) -> Tensor:
    """The part `name` of a weight [O, I, kt, kh, kw]."""
    if name == _WHOLE:
        return weight
    first, last = weight[:, :, :1], weight[:, :, -1:]
    if name in (_FIRST, _LAST):
        return first if name == _FIRST else last
    outer, middle = first + last, weight[:, :, 1:2]
    return (outer + middle if name == _SUM else outer - middle) / 2


@dataclass(frozen=True)
class _Band:
    """Rows of the output (`made`), and the rows of the input that they need, which may lie beyond its edges."""

    made: slice
    read: slice


def _band(top: int, end: int, height: int, padding: int, step: int = 1) -> _Band:
    """The band of output rows [top, end), for a kernel of `height` rows and a stride of `step`."""
    return _Band(slice(top, end), slice(top * step - padding, (end - 1) * step - padding + height))


def _framed(space: Tensor, band: _Band, rows: int) -> tuple[Tensor, slice, Tensor]:
    """Prepare the buffer `space` [B, T, h, W, I] for the rows that a band reads of an input with `rows` rows.

    Returns three things: the rows of `space` for the convolution, with zeros beyond the edges of the input; the
    rows to copy from the input; the view of `space` to which they are copied.
    """
    first, last = band.read.start, band.read.stop
    there = slice(max(first, 0), min(last, rows))
    space = space[:, :, : last - first]
    space[:, :, : there.start - first].zero_()
    space[:, :, there.stop - first :].zero_()
    return space, there, space[:, :, there.start - first : there.stop - first]


def _is_within(band: _Band, x: Tensor, margins: Margins) -> bool:
    """Whether the band reads no pixel in the `margins` of x."""
    rows = x.shape[2]
    first, last = max(band.read.start, 0), min(band.read.stop, rows)
    across = margins.left or margins.right
    return not across and first >= margins.top and last <= rows - margins.bottom


@dataclass(frozen=True)
class _Pairs:
    """Computes the frames y [1, T, H', W', O] two at a time.

    x: the two past frames [1, 2, H, W, I], and the chunk's frames [1, T, H, W, I].
    adds: whether results are added to y.
    space: [1, 1, h, W, I], the buffer for the input of each convolution.
    packed: the reordered first tap, sum, difference and last tap.
    """

    x: tuple[Tensor, Tensor]
    y: Tensor
    adds: bool
    space: Tensor
    packed: Sequence[Tensor]
    bias: Tensor
    pad: tuple[int, int, int]

    def make(self, band: _Band) -> None:
        """Compute one band of rows of every frame."""
        space, there, inner = _framed(self.space, band, self.x[1].shape[2])
        x = [frame for part in self.x for frame in part[:, :, there].split(1, dim=1)]
        y = self.y[:, :, band.made].split(1, dim=1)
        for time in range(0, len(y), 2):
            self._pair(x[time : time + 4], y[time : time + 2], space, inner)

    def _pair(self, x: Sequence[Tensor], y: Sequence[Tensor], space: Tensor, inner: Tensor) -> None:
        """Compute two frames from the four frames that they read. `inner` is the part of `space` without zeros."""
        first, total, difference, last = self.packed
        (x0, x1, x2, x3), (y0, y1) = x, y
        torch.add(x1, x2, out=inner)
        a = _convolved(space, total, None, self.pad)
        torch.sub(x2, x1, out=inner)
        b = _convolved(space, difference, None, self.pad)
        if self.adds:
            y0.add_(a).add_(b)
            y1.add_(a).sub_(b)
        else:
            torch.add(a, b, out=y0)
            torch.sub(a, b, out=y1)
        del a, b
        torch.sub(x0, x2, out=inner)
        _convolved_onto(y0, space, first, self.bias, self.pad)
        torch.sub(x3, x1, out=inner)
        _convolved_onto(y1, space, last, self.bias, self.pad)


def _convolved(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    pad: tuple[int, int, int],
    stride: tuple[int, int, int] = (1, 1, 1),
) -> Tensor:
    geometry = (pad, stride, (1, 1, 1), 1)
    frames = x.permute(0, 4, 1, 2, 3)
    return _channels_last(torch.ops.mkldnn._convolution_pointwise(frames, packed, bias, *geometry, "none", [], ""))


def _convolved_onto(
    onto: Tensor,
    x: Tensor,
    packed: Tensor,
    bias: Tensor,
    pad: tuple[int, int, int],
    stride: tuple[int, int, int] = (1, 1, 1),
) -> None:
    geometry = (pad, stride, (1, 1, 1), 1)
    target, frames = onto.permute(0, 4, 1, 2, 3), x.permute(0, 4, 1, 2, 3)
    torch.ops.mkldnn._convolution_pointwise_.binary(
        target, frames, packed, bias, *geometry, "add", 1.0, None, [], None
    )


def _channels_last(out: Tensor) -> Tensor:
    return out.permute(0, 2, 3, 4, 1).contiguous()


def _onednn(x: Tensor) -> bool:
    available = takes_host_path(x) and torch.backends.mkldnn.is_available()
    return available and x.dtype in (torch.float32, torch.bfloat16)


def upsampling_weights(weight: Tensor) -> list[Tensor]:
    """Four 2 x 2 kernels [O, I, 1, 2, 2] that equal doubling the picture, then the 3 x 3 `weight` [O, I, 3, 3].

    They are in order of (row parity, column parity) of the output. An even output row reads the input rows above
    and at it (taps 0 and 1 + 2), an odd output row those at and below it (taps 0 + 1 and 2). Taps are summed in
    float32.
    """

    def fold(w: Tensor, dim: int, odd: int) -> Tensor:
        a, b, c = w.unbind(dim)
        return torch.stack((a + b, c) if odd else (a, b + c), dim)

    full = weight.float()
    return [
        fold(fold(full, 2, row), 3, col).to(weight.dtype).unsqueeze(2).contiguous()
        for row in (0, 1)
        for col in (0, 1)
    ]
