"""The transformer's ops of one pass: RMS norms with the sum before or the rotation after them, and the gate.

Exactness. The plain ops here are diffusers', rounded where its modules round: a norm in half precision before and
after its weight, a rotation after each product and sum, the gate after SiLU. The kernels round in the same places
and sum squares in an order of their own, so a result may be `ULPS` units of the last place away from the plain
ops'. It depends on its own token (and head) alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos3_pipeline.fused.backend import declare

# Units in the last place, of the largest number on the way to the result: a norm in half precision is rounded
# twice, and a rotation adds two products of it.
ULPS = {torch.float32: 8, torch.bfloat16: 2, torch.float16: 2}


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dim, as diffusers' `RMSNorm` has it where `weight` has the dtype of x."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + eps)).to(x.dtype) * weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """`x * cos + rotate_half(x) * sin` for x [tokens, heads, D] and angles [tokens, 1, D], into `out` when given.

    Halves instead of a rotated copy: the same products and sums, so the same bits.
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
# The RMS norm of every head of x [tokens, heads, D], turned by its token's angles [tokens, 1, D], into `out`.
declare(
    "norm_rotate(Tensor x, Tensor weight, float eps, Tensor cos, Tensor sin, *, Tensor(a!) out) -> ()",
    _norm_rotate,
    _nothing,
)
# SiLU of `gate` times `up`, both [n, C] and contiguous, in the place of `gate`.
declare("silu_mul(Tensor(a!) gate, Tensor up) -> ()", _silu_mul, _nothing)
