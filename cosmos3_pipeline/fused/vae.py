"""The VAE's ops of one pass: norm and SiLU into the buffer of the next convolution, and pictures as bytes.

Activations are channels-last: [B, T, H, W, C], with any strides but for the channels, which lie side by side.

Exactness. The plain ops here have the bits of those that a CPU runs. The kernels round where the plain ops do, and
sum a pixel's squares in an order of their own: a result is within `ULPS` of the last place of its dtype from the
plain ops'. A pixel's value depends on its own channels alone, and the order of the sum on their number and dtype
alone. So a pixel has the same bits in every slab, tile and portion, and strategies stay equal bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos3_pipeline.fused.backend import declare

# Units in the last place: by how much a kernel's result may differ from the plain ops'. In float32 the norm, the
# exponential and the division each add some; in half precision all of them together move a rounding.
ULPS = {torch.float32: 8, torch.bfloat16: 1, torch.float16: 1}


def widened(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is so already."""
    return x if x.dtype == torch.float64 else x.float()


def plain_rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """RMS norm over the last dimension: x / ||x|| * gamma, in float32 unless x is float64.

    Source: `WanRMS_norm`. `gamma` is [C], wide, with sqrt(C) in it. Returns float32 or float64.
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

    The arithmetic and dtypes of diffusers' `VideoProcessor.postprocess_video`, so the bytes equal its.
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
# A contiguous picture [B, 3, F, H, W] in [-1, 1] as bytes [B, F, H, W, 3]. The kernel has the plain ops' bits.
declare("picture_bytes(Tensor picture) -> Tensor", plain_picture_bytes, _bytes_of_shape)
# SiLU of that norm, rounded once, into `out` of the shape of x.
declare("norm_silu(Tensor x, Tensor gamma, *, Tensor(a!) out) -> ()", _norm_silu, _nothing)
# The same behind the frames that a causal convolution has `kept` [B, k, H, W, C], into `out` [B, k + T, H, W, C];
# the last k frames of that are kept then.
declare(
    "norm_silu_after(Tensor x, Tensor gamma, Tensor(a!) kept, *, Tensor(b!) out) -> ()", _norm_silu_after, _nothing
)
# Both of what `added`, of the shape of x and as it lies in memory, is first added to x: the end of a shortcut.
declare(
    "add_norm_silu(Tensor(a!) x, Tensor added, Tensor gamma, *, Tensor(b!) out) -> ()", _add_norm_silu, _nothing
)
declare(
    "add_norm_silu_after(Tensor(a!) x, Tensor added, Tensor gamma, Tensor(b!) kept, *, Tensor(c!) out) -> ()",
    _add_norm_silu_after,
    _nothing,
)
