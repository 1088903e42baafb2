"""The transformer's one-pass ops: an RMS norm, alone or with the sum before it or the rotation after it; the gate.

Exactness. The plain ops here are diffusers', and round where its modules round: a norm in half precision before
and after its weight, a rotation after each product and sum, the gate after SiLU. The kernels round in the same
places but sum squares in another order, so a result may differ from the plain ops' by `ULPS` units in the last
place. It depends only on its token (and head).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos3_pipeline.fused.backend import declare

# Units in the last place of the largest intermediate number: a norm in half precision is rounded twice, and a
# rotation adds two products of the norm.
ULPS = {torch.float32: 8, torch.bfloat16: 2, torch.float16: 2}


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dim, equal to diffusers' `RMSNorm` if `weight` has the dtype of x."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + eps)).to(x.dtype) * weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """`x * cos + rotate_half(x) * sin` for x [tokens, heads, D] and angles [tokens, 1, D], into `out` unless None.

    It computes each half in place of a rotated copy. Products and sums are the same, so the bits are the same.
    """
    half = x.shape[-1] // 2
    out = torch.mul(x, cos) if out is None else torch.mul(x, cos, out=out)
    out[..., :half] -= x[..., half:] * sin[..., :half]
    out[..., half:] += x[..., :half] * sin[..., half:]
    return out


def _add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + added
    return total, plain_rms_norm(total, weight, eps)


def _norm_rotate(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, *, out: Tensor) -> None:
    rotated(plain_rms_norm(x, weight, eps), cos, sin, out)


def _silu_mul(gate: Tensor, up: Tensor) -> None:
    F.silu(gate, inplace=True).mul_(up)


def _nothing(*args: object, **kwargs: object) -> None:
    return


# The RMS norm of the rows of x [n, C].
declare(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    plain_rms_norm,
    lambda x, weight, eps: x.new_empty(x.shape),
)
# The sum of x and `added` [n, C], and its RMS norm.
declare(
    "add_rms_norm(Tensor x, Tensor added, Tensor weight, float eps) -> (Tensor, Tensor)",
    _add_rms_norm,
    lambda x, added, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
# The RMS norm of every head of x [tokens, heads, D], rotated by its token's angles [tokens, 1, D], into `out`.
declare(
    "norm_rotate(Tensor x, Tensor weight, float eps, Tensor cos, Tensor sin, *, Tensor(a!) out) -> ()",
    _norm_rotate,
    _nothing,
)
# SiLU(`gate`) x `up`, both [n, C] and contiguous; overwrites `gate`.
declare("silu_mul(Tensor(a!) gate, Tensor up) -> ()", _silu_mul, _nothing)
