"""The arithmetic of the VAE: convolution, norm and activation, attention. The only place that picks kernels.

Every strategy and the replicated reference run these, so a faster kernel changes all of them alike and their
outputs stay comparable bit for bit. Activations are channels-last and contiguous: [B, T, H, W, C].

On CPU the convolutions call oneDNN directly with weights reordered once. PyTorch's own choice falls back to a
slow kernel for small inputs, and reorders the weights at every call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos3_pipeline.vae.footprint import NORM_BLOCK_ELEMENTS
from cosmos3_pipeline.vae.host_memory import long_lived

# The shapes of a clip: its first chunk's and the later ones'.
_SHAPES = 2


class Convolution:
    """A 3D convolution over channels-last activations, its weights bound and reordered on first use.

    `weight` is [O, I, kt, kh, kw], `bias` [O]. Once the whole weight has been reordered, the given one is let go.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._taps = weight.shape[2]
        self._given: Tensor | None = weight
        self._bias = bias
        self._packed: dict[tuple[int, ...], Tensor] = {}

    def __call__(
        self,
        x: Tensor,
        *,
        padding: tuple[int, int] = (0, 0),
        stride: tuple[int, int, int] = (1, 1, 1),
        taps: int = 0,
        onto: Tensor | None = None,
    ) -> Tensor:
        """[B, T, H, W, I] -> [B, T', H', W', O]; `padding` adds zero rows and columns on both sides.

        `taps` > 0 computes only the last `taps` temporal taps: right where the frames before are zeros.
        The result is added `onto` [B, T', H', W', O], contiguous, which is returned; oneDNN rounds the sum once.
        """
        taps = taps or self._taps
        pad = (0, *padding)
        frames = x.permute(0, 4, 1, 2, 3)
        if _onednn(x):
            packed = self._pack(taps, frames, pad, stride)
            geometry = (pad, stride, (1, 1, 1), 1)
            if onto is None:
                out = torch.ops.mkldnn._convolution_pointwise(
                    frames, packed, self._bias, *geometry, "none", [], ""
                )
                return _channels_last(out)
            # Where the sum was is still in a cache when it is written, and no memory is needed for another tensor.
            torch.ops.mkldnn._convolution_pointwise_.binary(
                onto.permute(0, 4, 1, 2, 3), frames, packed, self._bias, *geometry, "add", 1.0, None, [], None
            )
            return onto
        out = F.conv3d(frames, self._weight()[:, :, -taps:], self._bias, stride=stride, padding=pad)
        out = _channels_last(out)
        return out if onto is None else onto.add_(out)

    def _pack(self, taps: int, frames: Tensor, pad: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        """The last `taps` temporal taps in the order that oneDNN wants for frames of this shape.

        Which order is best depends on the shape, and weights in another would be reordered at every call. Kept for
        the shapes that were used last.
        """
        key = (taps, *frames.shape)
        if key in self._packed:
            packed = self._packed.pop(key)
        else:
            reorder: Any = torch._C._nn.mkldnn_reorder_conv3d_weight
            with long_lived():
                weight = self._weight()[:, :, -taps:].contiguous().to_mkldnn()
                packed = reorder(weight, pad, stride, (1, 1, 1), 1, list(frames.shape))
        self._packed[key] = packed  # the last used is last
        if taps == self._taps:
            self._given = None
        if len(self._packed) > _SHAPES:
            whole = [key for key in self._packed if key[0] == self._taps]
            oldest = next(key for key in self._packed if self._given is not None or [key] != whole)
            del self._packed[oldest]
        return packed

    def _weight(self) -> Tensor:
        if self._given is not None:
            return self._given
        return next(packed.to_dense() for (taps, *_), packed in self._packed.items() if taps == self._taps)


def _channels_last(out: Tensor) -> Tensor:
    return out.permute(0, 2, 3, 4, 1).contiguous()


def _onednn(x: Tensor) -> bool:
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if x.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return x.dtype == torch.float32


def upsampling_weights(weight: Tensor) -> list[Tensor]:
    """The four 2 x 2 kernels, [O, I, 1, 2, 2], that equal doubling the picture and a 3 x 3 `weight` [O, I, 3, 3].

    In order of (row parity, column parity) of the output. An even output row reads the small rows above and at it
    (taps 0 and 1 + 2), an odd one those at and below it (taps 0 + 1 and 2). Summed in float32.
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


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """RMS norm over the last dimension: x / ||x|| * sqrt(C) * gamma, in float32 whatever the dtype of x.

    Source: `WanRMS_norm`. `gamma` is [C] in float32. Returns float32.
    """
    wide = x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min_(1e-12).reciprocal_()
    return torch.mul(wide, scale).mul_(gamma * gamma.shape[0] ** 0.5)


def norm_silu(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    """SiLU of the RMS norm of x [B, T, H, W, C], written into `out` (same shape, any strides), rounded once.

    Works through the picture in blocks of rows that fit a core's cache, because each of its passes would otherwise
    go through memory. The result of a pixel does not depend on the blocks.
    """
    b, t, h, w, c = x.shape
    rows = max(1, NORM_BLOCK_ELEMENTS // (w * c)) if x.device.type == "cpu" else h
    for frame, target in zip(x.reshape(b * t, h, w, c).unbind(0), _frames(out), strict=True):
        for top in range(0, h, rows):
            normed, block = rms_norm(frame[top : top + rows], gamma), target[top : top + rows]
            if block.dtype == normed.dtype:
                torch.ops.aten.silu.out(normed, out=block)
            else:
                block.copy_(F.silu(normed, inplace=True))


def _frames(x: Tensor) -> list[Tensor]:
    return [frame for clip in x.unbind(0) for frame in clip.unbind(0)]


def attention(x: Tensor, qkv: tuple[Tensor, Tensor], proj: tuple[Tensor, Tensor]) -> Tensor:
    """Single-head self-attention over the pixels of each frame of x [B, T, H, W, C], without residual.

    `qkv` and `proj` are (weight, bias) of linear maps C -> 3C and C -> C. Source: `WanAttentionBlock`.
    """
    b, t, h, w, c = x.shape
    q, k, v = F.linear(x.reshape(b * t, 1, h * w, c), *qkv).chunk(3, dim=-1)
    mixed = F.scaled_dot_product_attention(q, k, v)
    return F.linear(mixed, *proj).reshape(b, t, h, w, c)
