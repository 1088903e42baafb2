# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The kernels of this package's ops, in Triton. Imported where there is a CUDA device, and by tests.

Each program computes whole pixels or tokens. Sizes and strides are not specialised on: a kernel has one compiled
form for each number of channels and dtype, so its sums have one order. A product and a sum are never contracted
(`enable_fp_fusion`), and products are rounded to the tensor's dtype where the plain ops round them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of which a program has a row or more in registers, and its warps: half a kilobyte a warp and load.
_ELEMENTS = 2048
WARPS = 4
OPTIONS: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": False}


def block_of(channels: int) -> dict[str, int]:
    """How many rows of so many channels a program has at once."""
    block = triton.next_power_of_2(channels)
    return {"C": channels, "BLOCK_C": block, "ROWS": max(1, _ELEMENTS // block)}


@triton.jit
def _normed(x, gamma):
    """x [rows, channels] in float32 over its length, times gamma [channels]."""
    length = tl.sqrt_rn(tl.sum(x * x, axis=1))
    scale = tl.div_rn(1.0, tl.maximum(length, 1e-12))
    return x * scale[:, None] * gamma[None, :]


@triton.jit
def _silu(x):
    return tl.div_rn(x, 1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["pixels", "T", "H", "W", *(f"{t}{d}" for t in "xko" for d in "bthw")])
def norm_silu_kernel(
    x,
    gamma,
    kept,
    out,
    pixels,
    T,
    H,
    W,
    xb,
    xt,
    xh,
    xw,
    kb,
    kt,
    kh,
    kw,
    ob,
    ot,
    oh,
    ow,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    KEPT: tl.constexpr,
    SILU: tl.constexpr,
):
    """Of `pixels` = B x H x W, each through its T frames. Strides are in pixels, so that channels divide them."""
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_C)
    there = (pixel < pixels)[:, None] & (channel < C)[None, :]
    b, h, w = pixel // (H * W), pixel // W % H, pixel % W
    source = x + (b * xb + h * xh + w * xw)[:, None] * C + channel[None, :]
    target = out + (b * ob + h * oh + w * ow)[:, None] * C + channel[None, :]
    weight = tl.load(gamma + channel, mask=channel < C, other=0.0)
    if KEPT:
        memory = kept + (b * kb + h * kh + w * kw)[:, None] * C + channel[None, :]
        # A program has its pixels to itself: it reads a kept frame before it writes another in its place.
        for k in tl.static_range(KEPT):
            frame = tl.load(memory + k * kt.to(tl.int64) * C, mask=there)
            tl.store(target + k * ot.to(tl.int64) * C, frame, mask=there)
            if k >= T:
                tl.store(memory + (k - T) * kt.to(tl.int64) * C, frame, mask=there)
    for t in range(T):
        y = _normed(tl.load(source + t * xt.to(tl.int64) * C, mask=there, other=0.0).to(tl.float32), weight)
        if SILU:
            y = _silu(y)
        y = y.to(out.dtype.element_ty)
        tl.store(target + (KEPT + t) * ot.to(tl.int64) * C, y, mask=there)
        if KEPT:  # noqa: SIM102 # the outer one is known when the kernel is compiled
            if t + KEPT >= T:
                tl.store(memory + (t + KEPT - T) * kt.to(tl.int64) * C, y, mask=there)


def _in_pixels(tensor: Tensor) -> tuple[int, ...]:
    """The strides of frames, rows and columns, counted in pixels."""
    return tuple(stride // tensor.shape[-1] for stride in tensor.stride()[:-1])


def _launch_norm(x: Tensor, gamma: Tensor, kept: Tensor | None, out: Tensor, *, silu: bool) -> None:
    b, t, h, w, c = x.shape
    block = block_of(c)
    memory = x if kept is None else kept
    norm_silu_kernel[(triton.cdiv(b * h * w, block["ROWS"]),)](
        *(x, gamma, memory, out, b * h * w, t, h, w),
        *(*_in_pixels(x), *_in_pixels(memory), *_in_pixels(out)),
        **block,
        KEPT=0 if kept is None else kept.shape[1],
        SILU=silu,
        **OPTIONS,
    )


def vae_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """As `torch.ops.cosmos3.vae_norm`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch_norm(x, gamma, None, out, silu=False)
    return out


def norm_silu(x: Tensor, gamma: Tensor, *, out: Tensor) -> None:
    """As `torch.ops.cosmos3.norm_silu`."""
    _launch_norm(x, gamma, None, out, silu=True)


def norm_silu_after(x: Tensor, gamma: Tensor, kept: Tensor, *, out: Tensor) -> None:
    """As `torch.ops.cosmos3.norm_silu_after`."""
    _launch_norm(x, gamma, kept, out, silu=True)
