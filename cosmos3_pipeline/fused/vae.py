"""The VAE's one-pass ops: norm and SiLU into the buffer of the next convolution, and pictures as bytes.

Activations are channels-last: [B, T, H, W, C]. Channels must be contiguous; other strides are arbitrary.

Exactness. The plain ops here give the same bits as the ops of a CPU. The kernels round where the plain ops round,
but sum a pixel's squares in another order, so a result may differ by `ULPS` units in the last place of its dtype.
A pixel's value depends only on its channels, and the order of the sum only on their number and dtype. A pixel
therefore has the same bits in every slab, tile and portion, and strategies stay equal bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos3_pipeline.fused.backend import declare

# By how many units in the last place a kernel's result may differ from the plain ops'. In float32 the norm, the
# exponential and the division each add some; in half precision all of them together can change one rounding.
ULPS = {torch.float32: 8, torch.bfloat16: 1, torch.float16: 1}


def widened(x: Tensor) -> Tensor:
    """x in float32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def plain_rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """RMS norm over the last dimension: x / ||x|| * gamma, in float32 unless x is float64.

    Source: `WanRMS_norm`. `gamma` is [C] in float32 or float64, multiplied by sqrt(C). Returns float32 or float64.
    """
    wide = widened(x)
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min_(1e-12).reciprocal_()
    # No other tensor shares the widened copy, so it is multiplied in place.
    normed = torch.mul(wide, scale) if wide is x else wide.mul_(scale)
    return normed.mul_(gamma)


def _norm(x: Tensor, gamma: Tensor) -> Tensor:
    return plain_rms_norm(x, gamma).to(x.dtype)


def _norm_silu(x: Tensor, gamma: Tensor, *, out: Tensor) -> None:
    normed = plain_rms_norm(x, gamma)
    if out.dtype == normed.dtype:
        torch.ops.aten.silu.out(normed, out=out)
    else:
        out.copy_(F.silu(normed, inplace=True))


def _norm_silu_after(x: Tensor, gamma: Tensor, kept: Tensor, *, out: Tensor) -> None:
    count = kept.shape[1]
    out[:, :count].copy_(kept)
    _norm_silu(x, gamma, out=out[:, count:])
    kept.copy_(out[:, -count:])


def _add_norm_silu(x: Tensor, added: Tensor, gamma: Tensor, *, out: Tensor) -> None:
    _norm_silu(x.add_(added), gamma, out=out)


def _add_norm_silu_after(x: Tensor, added: Tensor, gamma: Tensor, kept: Tensor, *, out: Tensor) -> None:
    _norm_silu_after(x.add_(added), gamma, kept, out=out)


def plain_picture_bytes(picture: Tensor) -> Tensor:
    """[B, 3, F, H, W] in [-1, 1] to bytes [B, F, H, W, 3].

    Arithmetic and dtypes follow diffusers' `VideoProcessor.postprocess_video`, so the bytes are equal.
    """
    halved = (picture * 0.5 + 0.5).clamp_(0, 1).permute(0, 2, 3, 4, 1)
    return halved.float().mul_(255).round_().to(torch.uint8).contiguous()


def _bytes_of_shape(picture: Tensor) -> Tensor:
    b, c, t, h, w = picture.shape
    return picture.new_empty(b, t, h, w, c, dtype=torch.uint8)


def _nothing(*args: Tensor, **kwargs: Tensor) -> None:
    return


# The RMS norm of x [B, T, H, W, C] in the dtype of x; `gamma` [C] is float32.
declare("vae_norm(Tensor x, Tensor gamma) -> Tensor", _norm, lambda x, gamma: x.new_empty(x.shape))
# A contiguous picture [B, 3, F, H, W] in [-1, 1] as bytes [B, F, H, W, 3]. Kernel and plain ops give the same
# bits.
declare("picture_bytes(Tensor picture) -> Tensor", plain_picture_bytes, _bytes_of_shape)
# SiLU of the RMS norm of x, rounded once, into `out` of the shape of x.
declare("norm_silu(Tensor x, Tensor gamma, *, Tensor(a!) out) -> ()", _norm_silu, _nothing)
# As `norm_silu`, into the last T frames of `out` [B, k + T, H, W, C]. The first k frames are the temporal cache
# `kept` [B, k, H, W, C] of a causal convolution. Then `kept` is overwritten by the last k frames of `out`.
declare(
    "norm_silu_after(Tensor x, Tensor gamma, Tensor(a!) kept, *, Tensor(b!) out) -> ()", _norm_silu_after, _nothing
)
# As the two ops above, but first x += `added`, which ends a shortcut. `added` has the shape and strides of x.
declare(
    "add_norm_silu(Tensor(a!) x, Tensor added, Tensor gamma, *, Tensor(b!) out) -> ()", _add_norm_silu, _nothing
)
declare(
    "add_norm_silu_after(Tensor(a!) x, Tensor added, Tensor gamma, Tensor(b!) kept, *, Tensor(c!) out) -> ()",
    _add_norm_silu_after,
    _nothing,
)
