"""Every Triton kernel against the plain ops of its op, on tensors of the host.

    TRITON_INTERPRET=1 python tests/interpreted_kernels.py

The interpreter computes what a kernel says with NumPy, so it shows a wrong index, mask or formula and not the last
bits of a GPU's exponential. It cuts bits off where a GPU rounds to bfloat16 (Triton 3.7); that is put right here.
Prints each case that is further from the plain ops than their module declares.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from cosmos3_pipeline.fused import transformer, triton_kernels, vae

PLAIN: Any = torch.ops.cosmos3
DTYPES = (torch.float32, torch.bfloat16)
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """What a kernel and the plain op made. `ulps` are those of a value, or of its row's largest if `by_row`."""

    name: str
    found: Tensor
    plain: Tensor
    ulps: int
    by_row: bool = False

    @property
    def distance(self) -> float:
        """In units of the last place."""
        found, plain = self.found.double(), self.plain.double()
        size = plain.abs().amax(-1, keepdim=True) if self.by_row else plain.abs()
        unit = torch.finfo(self.plain.dtype).eps * size.clamp_min(1e-30)
        return float(((found - plain).abs() / unit).max())


def in_view(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor [B, T, H, W, C] inside a larger one, so that its channels alone are dense."""
    b, t, h, w, c = shape
    return torch.randn(b + 1, t + 1, h + 3, w + 2, c).to(dtype)[:b, 1:, 2 : 2 + h, 1 : 1 + w]


def pictures() -> Iterator[Case]:
    """Norms of activations with odd sizes, strides, and channels that are no power of two."""
    for dtype, channels, frames in product(DTYPES, (8, 12, 96, 160), (1, 2, 3)):
        name, ulps = f"{dtype}, {frames} frames, {channels} channels", vae.ULPS[dtype]
        x = in_view(2, frames, 3, 5, channels, dtype=dtype)
        x[0, 0, 0, 0] = 0  # a pixel without length
        gamma = torch.rand(channels) * math.sqrt(channels)
        yield Case(f"vae_norm, {name}", triton_kernels.vae_norm(x, gamma), PLAIN.vae_norm(x, gamma), ulps)
        outs = [torch.full((2, frames, 5, 9, channels), 7.0).to(dtype) for _ in range(2)]
        triton_kernels.norm_silu(x, gamma, out=outs[0][:, :, 1:4, 3:8])
        PLAIN.norm_silu(x, gamma, out=outs[1][:, :, 1:4, 3:8])
        yield Case(f"norm_silu, {name}", *outs, ulps)
        kept = torch.randn(2, 2, 3, 5, channels).to(dtype)
        kepts = [kept.clone() for _ in range(2)]
        outs = [x.new_empty(2, 2 + frames, 3, 5, channels) for _ in range(2)]
        triton_kernels.norm_silu_after(x, gamma, kepts[0], out=outs[0])
        PLAIN.norm_silu_after(x, gamma, kepts[1], out=outs[1])
        yield Case(f"norm_silu_after, {name}", *outs, ulps)
        yield Case(f"norm_silu_after, what is kept, {name}", *kepts, ulps)
        added, sums = torch.randn(x.shape).to(dtype), [x.contiguous() for _ in range(2)]
        triton_kernels.add_norm_silu(sums[0], added, gamma, out=outs[0][:, 2:])
        PLAIN.add_norm_silu(sums[1], added, gamma, out=outs[1][:, 2:])
        yield Case(f"add_norm_silu, {name}", *outs, ulps)
        yield Case(f"add_norm_silu, the sum, {name}", *sums, 0)
        triton_kernels.add_norm_silu_after(sums[0], added, gamma, kepts[0], out=outs[0])
        PLAIN.add_norm_silu_after(sums[1], added, gamma, kepts[1], out=outs[1])
        yield Case(f"add_norm_silu_after, {name}", *outs, ulps)
        yield Case(f"add_norm_silu_after, the sum, {name}", *sums, 0)


def parts() -> Iterator[Case]:
    """A pixel has the same bits in whatever part of the picture it is computed."""
    for dtype in DTYPES:
        x, gamma = torch.randn(1, 4, 6, 7, 96).to(dtype), torch.rand(96)
        whole = triton_kernels.vae_norm(x, gamma)
        part = (slice(None), slice(1, 3), slice(2, 5), slice(3, 4))
        yield Case(f"a part, {dtype}", triton_kernels.vae_norm(x[part], gamma), whole[part], 0)


def in_bytes() -> Iterator[Case]:
    """Pictures of odd sizes, beyond [-1, 1] too, and at the halves between two bytes."""
    for dtype, (frames, rows, cols) in product(DTYPES, ((1, 3, 8), (2, 5, 24), (3, 17, 40))):
        picture = torch.randn(2, 3, frames, rows, cols)
        halves = (torch.arange(256) + 0.5) / 255 * 2 - 1
        picture.flatten()[: picture.numel() // 2].copy_(
            halves.repeat(picture.numel() // 512 + 1)[: picture.numel() // 2]
        )
        picture = picture.to(dtype)
        name = f"picture_bytes, {dtype}, {frames} frames"
        yield Case(name, triton_kernels.picture_bytes(picture).float(), PLAIN.picture_bytes(picture).float(), 0)


def tokens() -> Iterator[Case]:
    """Norms of tokens and of heads, and gates."""
    for dtype, channels in product(DTYPES, (8, 48, 320)):
        name, ulps = f"{dtype}, {channels} channels", transformer.ULPS[dtype]
        x, added = (torch.randn(7, channels).to(dtype) for _ in range(2))
        weight = torch.rand(channels).to(dtype)
        found, plain = triton_kernels.rms_norm(x, weight, EPS), PLAIN.rms_norm(x, weight, EPS)
        yield Case(f"rms_norm, {name}", found, plain, ulps)
        found_sum, found = triton_kernels.add_rms_norm(x, added, weight, EPS)
        plain_sum, plain = PLAIN.add_rms_norm(x, added, weight, EPS)
        yield Case(f"add_rms_norm, the sum, {name}", found_sum, plain_sum, 0)
        yield Case(f"add_rms_norm, {name}", found, plain, ulps)
        gates = [x.clone(), x.clone()]
        triton_kernels.silu_mul(gates[0], added)
        PLAIN.silu_mul(gates[1], added)
        yield Case(f"silu_mul, {name}", *gates, ulps)
    for dtype, heads, size in product(DTYPES, (1, 3), (16, 48)):
        x = torch.randn(5, heads + 2, size).to(dtype)[:, 1 : 1 + heads]  # as heads are cut out of a message
        cos, sin = (torch.randn(5, 1, size).to(dtype) for _ in range(2))
        weight = torch.rand(size).to(dtype)
        outs = [torch.zeros(9, heads, size, dtype=dtype) for _ in range(2)]
        triton_kernels.norm_rotate(x, weight, EPS, cos, sin, out=outs[0][4:])
        PLAIN.norm_rotate(x, weight, EPS, cos, sin, out=outs[1][4:])
        yield Case(f"norm_rotate, {dtype}, {heads} x {size}", *outs, transformer.ULPS[dtype], by_row=True)


def round_to_nearest() -> None:
    """Let the interpreter round to bfloat16 as a GPU does."""
    builder: Any = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def nearest(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, source, target)
        rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.int16).numpy()
        return interpreter.TensorHandle(rounded.view("uint16"), target.scalar)

    builder.cast_impl = nearest


def main() -> int:
    """1 if a case is too far away, or there is none."""
    torch.manual_seed(0)
    round_to_nearest()
    cases = [*pictures(), *parts(), *in_bytes(), *tokens()]
    wrong = [case for case in cases if not case.distance <= case.ulps]
    for case in wrong:
        print(f"{case.name}: {case.distance:.2f} units of the last place, {case.ulps} are declared")
    print(f"{len(cases)} cases, {max(case.distance for case in cases):.2f} units at most")
    return 1 if wrong or not cases else 0


if __name__ == "__main__":
    sys.exit(main())
