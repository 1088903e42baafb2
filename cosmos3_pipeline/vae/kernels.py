"""The arithmetic of the VAE beside its convolutions (`convolution.py`): norm and activation, attention.

Every strategy and the replicated reference use these functions. A faster kernel therefore changes all of them
alike, and their outputs stay comparable bit for bit. Activations are channels-last and contiguous:
[B, T, H, W, C].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos3_pipeline.distributed.host_path import takes_host_path
from cosmos3_pipeline.fused.vae import plain_rms_norm, widened
from cosmos3_pipeline.vae.blocking import NORM_BLOCK_ELEMENTS


def arithmetic_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which activations of `dtype` are convolved and multiplied by matrices, and then rounded once.

    It is float32 for bfloat16 on a processor without bfloat16 instructions, because PyTorch's own loops are some
    fifty times as slow there. Otherwise it is `dtype`.
    """
    if dtype != torch.bfloat16 or not takes_host_path(device) or not torch.backends.mkldnn.is_available():
        return dtype
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def norm_weight(gamma: Tensor) -> Tensor:
    """A norm's weight with C elements as the norm kernels take it: [C], float32 or wider, times sqrt(C)."""
    weight: Tensor = widened(gamma).flatten() * gamma.numel() ** 0.5
    return weight


def norm_silu(x: Tensor, gamma: Tensor, out: Tensor, *, added: Tensor | None = None) -> None:
    """SiLU of the RMS norm of x [B, T, H, W, C], written into `out` (same shape, any strides), rounded once.

    `gamma` is a `norm_weight`. On an accelerator `added`, if not None, is added to x first. A CPU computes in
    blocks of rows or frames that fit in a core's cache, because otherwise each of its passes would read memory.
    The result of a pixel does not depend on the blocks.
    """
    if not takes_host_path(x):
        if added is None:
            torch.ops.cosmos3.norm_silu(x, gamma, out=out)
        else:
            torch.ops.cosmos3.add_norm_silu(x, added, gamma, out=out)
        return
    assert added is None, "a CPU has added it already"
    _, t, h, w, c = x.shape
    rows = max(1, NORM_BLOCK_ELEMENTS // (w * c))
    frames = max(1, rows // h)
    for clip, target in zip(x.unbind(0), out.unbind(0), strict=True):
        for start in range(0, t, frames):
            for top in range(0, h, rows):
                part = (slice(start, start + frames), slice(top, top + rows))
                normed, block = plain_rms_norm(clip[part], gamma), target[part]
                if block.dtype == normed.dtype:
                    torch.ops.aten.silu.out(normed, out=block)
                else:
                    block.copy_(F.silu(normed, inplace=True))
                del normed  # frees its memory before the next block is computed


def attention(own: Tensor, whole: Tensor, qkv: tuple[Tensor, Tensor], proj: tuple[Tensor, Tensor]) -> Tensor:
    """Single-head self-attention within each frame, without residual, for the pixels `own` [B, T, h, w, C].

    `whole` [B, T, H, W, C] has the whole frames, for keys and values. `qkv` and `proj` are (weight, bias) of
    linear maps C -> 3C and C -> C. Source: `WanAttentionBlock`.
    """
    b, t, _, _, c = own.shape
    dtype, of_frames = arithmetic_dtype(own.dtype, own.device), (b * t, 1, -1, c)
    (weight, bias), to_output = (tuple(part.to(dtype) for part in pair) for pair in (qkv, proj))
    queries = F.linear(own.reshape(of_frames).to(dtype), weight[:c], bias[:c])
    keys, values = F.linear(whole.reshape(of_frames).to(dtype), weight[c:], bias[c:]).chunk(2, dim=-1)
    mixed = F.scaled_dot_product_attention(queries, keys, values)
    return F.linear(mixed, *to_output).reshape(own.shape).to(own.dtype)
