"""The convolution roofline: the convolutions of a program alone, each at the best time of the convolution library.

Each shape of convolution in the program is timed, separately for first and later chunks. The machine's convolution
library is called with weights that are reordered already and with channels-last activations, and its best time is
kept. The roofline adds up these times, each as often as the clip needs it. It has no norm, no copy and no other
op.

The roofline does not use this library's own kernels. It computes every tap of every frame. This library's kernels
compute two frames with a third fewer products, so they can be faster.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos3_pipeline.vae import ops
from cosmos3_pipeline.vae.kernels import arithmetic_dtype
from cosmos3_pipeline.vae.ops import LatentShape, Op
from cosmos3_pipeline.vae.program import Program

RUNS = 3  # runs of each shape in each round


@dataclass(frozen=True)
class ConvShape:
    """A convolution: input [B, T, H, W, I], `padding` rows and columns around it, kernel [O, I, kt, kh, kw]."""

    source: tuple[int, int, int, int, int]
    target_channels: int
    kernel: tuple[int, int, int]
    padding: tuple[int, int] = (0, 0)
    stride: tuple[int, int, int] = (1, 1, 1)

    @property
    def flops(self) -> int:
        """The number of multiplications and additions."""
        b, *size, channels = self.source
        padded = (size[0], size[1] + 2 * self.padding[0], size[2] + 2 * self.padding[1])
        outputs = [(n - k) // s + 1 for n, k, s in zip(padded, self.kernel, self.stride, strict=True)]
        return 2 * b * math.prod(outputs) * math.prod(self.kernel) * channels * self.target_channels


def convolutions(op: Op, latent: LatentShape, *, first: bool, portions: int = 1) -> list[ConvShape]:
    """The convolutions of `op` on one portion of a chunk, in the numbers and sizes that `op.flops` counts."""
    b, t, h, w, c = op.source.shape(latent, first=first)
    t //= portions
    if isinstance(op, ops.Conv):
        taps = 1 if first else op.kernel[0]
        rows, cols = op.kernel[1:]
        kernel, padding = (taps, rows, cols), (rows // 2, cols // 2)
        return [ConvShape((b, t + taps - 1, h, w, c), op.target.channels, kernel, padding)]
    if isinstance(op, ops.SpatialUp):
        return 4 * [ConvShape((b, t, h + 1, w + 1, c), op.target.channels, (1, 2, 2))]
    if isinstance(op, ops.SpatialDown):
        return [ConvShape((b, t, h + 1, w + 1, c), op.target.channels, (1, 3, 3), stride=(1, 2, 2))]
    if isinstance(op, ops.TimeUp) and not first:
        return [ConvShape((b, t + 2, h, w, c), 2 * op.target.channels, (3, 1, 1))]
    if isinstance(op, ops.TimeDown) and not first:
        return [ConvShape((b, t + 1, h, w, c), op.target.channels, (3, 1, 1), stride=(2, 1, 1))]
    if isinstance(op, ops.ShortcutBegin) and op.weights:
        return [ConvShape((b, t, h, w, c), op.kept.channels, (1, 1, 1))]
    return []


def shapes_of(program: Program, latent: LatentShape) -> Counter[ConvShape]:
    """The number of times that each convolution occurs in a clip of `latent`."""
    found: Counter[ConvShape] = Counter()
    later = program.chunks(latent) - 1
    for number, op in enumerate(program.ops):
        found.update(convolutions(op, latent, first=True))
        if later:
            portions = program.portions_at(number + 1, first=False)
            for shape in convolutions(op, latent, first=False, portions=portions):
                found[shape] += portions * later
    return found


class Roofline:
    """The best times so far of the convolutions of `program` on a clip of `latent`."""

    def __init__(self, program: Program, latent: LatentShape, dtype: torch.dtype, device: torch.device) -> None:
        self.counts = shapes_of(program, latent)
        self._best = dict.fromkeys(self.counts, math.inf)
        self._device = device
        self._ways: dict[ConvShape, list[Callable[[], Tensor]]] = {}
        self._dtype = dtype

    def measure(self) -> None:
        """Run every shape a few times in each of its `ways`."""
        for shape in self.counts:
            if shape not in self._ways:
                self._ways[shape] = ways(shape, self._dtype, self._device)
            for way in self._ways[shape]:
                for _ in range(RUNS):
                    self._best[shape] = min(self._best[shape], self._seconds(way))

    def _seconds(self, way: Callable[[], Tensor]) -> float:
        started = time.perf_counter()
        way()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - started

    def about(self) -> dict[str, Any]:
        """For the report: the seconds, and the rate and dtype of the convolutions."""
        dtype = str(arithmetic_dtype(self._dtype, self._device)).removeprefix("torch.")
        rate = self.flops / self.seconds / 1e9
        return {"seconds": self.seconds, "note": f"{rate:.0f} GFLOP/s over all of its convolutions, in {dtype}"}

    @property
    def seconds(self) -> float:
        """The seconds of the whole clip."""
        return sum(count * self._best[shape] for shape, count in self.counts.items())

    @property
    def flops(self) -> int:
        """The FLOPs of the whole clip."""
        return sum(count * shape.flops for shape, count in self.counts.items())


def ways(shape: ConvShape, dtype: torch.dtype, device: torch.device) -> list[Callable[[], Tensor]]:
    """The ways to compute one convolution: in 3D, and if it has one temporal tap, also as a 2D convolution.

    On CPU oneDNN is called directly, because PyTorch does not call it for every size. If oneDNN has no `dtype`, it
    computes in float32. On other devices PyTorch chooses the library.
    """
    b, t, h, w, c = shape.source
    dtype = arithmetic_dtype(dtype, device)
    x = torch.randn(shape.source, device=device).to(dtype)
    weight = torch.randn(shape.target_channels, c, *shape.kernel, device=device).to(dtype)
    bias = torch.randn(shape.target_channels, device=device).to(dtype)
    found = [_way(x.permute(0, 4, 1, 2, 3), weight, bias, shape.stride, (0, *shape.padding))]
    if shape.kernel[0] == 1:
        pictures = x.reshape(b * t, h, w, c).permute(0, 3, 1, 2)
        found.append(_way(pictures, weight.squeeze(2), bias, shape.stride[1:], shape.padding))
    return found


def _way(
    x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Callable[[], Tensor]:
    ones, flat = (1,) * len(stride), len(stride) == 2
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        memory = torch.channels_last if flat else torch.channels_last_3d
        laid_out = weight.contiguous(memory_format=memory)
        convolve: Any = F.conv2d if flat else F.conv3d
        return lambda: convolve(x, laid_out, bias, stride, padding)
    nn: Any = torch._C._nn
    reorder = nn.mkldnn_reorder_conv2d_weight if flat else nn.mkldnn_reorder_conv3d_weight
    packed = reorder(weight.contiguous().to_mkldnn(), padding, stride, ones, 1, list(x.shape))
    onednn: Any = torch.ops.mkldnn._convolution_pointwise
    return lambda: onednn(x, packed, bias, padding, stride, ones, 1, "none", [], "")
