# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The Triton kernels of this package's ops. Imported only on machines with a CUDA device, and by tests.

Each program computes whole pixels or tokens. Kernels are not specialised on sizes and strides: a kernel has one
compiled form for each number of channels and dtype, so its sums have one order. A product and a sum are never
fused into one instruction (`enable_fp_fusion`), and products are rounded to the tensor's dtype where plain ops
round them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# A program has one or more rows in registers, about this many elements, with WARPS warps: each warp then loads
# half a kilobyte at once.
_ELEMENTS = 2048
WARPS = 4
OPTIONS: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": False}


def block_of(channels: int) -> dict[str, int]:
    """The block sizes of a kernel for this number of channels: padded channels, and rows per program."""
    block = triton.next_power_of_2(channels)
    return {"C": channels, "BLOCK_C": block, "ROWS": max(1, _ELEMENTS // block)}


@triton.jit
def _normed(x, gamma):
    """x [rows, channels] in float32 divided by each row's length, times gamma [channels]."""
    length = tl.sqrt_rn(tl.sum(x * x, axis=1))
    scale = tl.div_rn(1.0, tl.maximum(length, 1e-12))
    return x * scale[:, None] * gamma[None, :]


@triton.jit
def _silu(x):
    return tl.div_rn(x, 1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["pixels", "T", "H", "W", *(f"{t}{d}" for t in "xko" for d in "bthw")])
def norm_silu_kernel(
    x,
    added,
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
    ADDS: tl.constexpr,
):
    """One program per ROWS of the `pixels` = B x H x W; it loops over their T frames.

    Strides are in pixels, so that element strides are multiples of C. `added` has the strides of x.
    """
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_C)
    there = (pixel < pixels)[:, None] & (channel < C)[None, :]
    b, h, w = pixel // (H * W), pixel // W % H, pixel % W
    at = (b * xb + h * xh + w * xw)[:, None] * C + channel[None, :]
    target = out + (b * ob + h * oh + w * ow)[:, None] * C + channel[None, :]
    weight = tl.load(gamma + channel, mask=channel < C, other=0.0)
    if KEPT:
        memory = kept + (b * kb + h * kh + w * kw)[:, None] * C + channel[None, :]
        # No other program has these pixels, so a kept frame can be read and then overwritten by another frame.
        for k in tl.static_range(KEPT):
            old = tl.load(memory + k * kt.to(tl.int64) * C, mask=there)
            tl.store(target + k * ot.to(tl.int64) * C, old, mask=there)
            if k >= T:
                tl.store(memory + (k - T) * kt.to(tl.int64) * C, old, mask=there)
    for t in range(T):
        frame = at + t * xt.to(tl.int64) * C
        y = tl.load(x + frame, mask=there, other=0.0).to(tl.float32)
        if ADDS:
            y = (y + tl.load(added + frame, mask=there, other=0.0).to(tl.float32)).to(x.dtype.element_ty)
            tl.store(x + frame, y, mask=there)
        y = _normed(y.to(tl.float32), weight)
        if SILU:
            y = _silu(y)
        y = y.to(out.dtype.element_ty)
        tl.store(target + (KEPT + t) * ot.to(tl.int64) * C, y, mask=there)
        if KEPT:  # noqa: SIM102 # the outer condition is a compile-time constant
            if t + KEPT >= T:
                tl.store(memory + (t + KEPT - T) * kt.to(tl.int64) * C, y, mask=there)


def _in_pixels(tensor: Tensor) -> tuple[int, ...]:
    """The strides of frames, rows and columns, counted in pixels."""
    return tuple(stride // tensor.shape[-1] for stride in tensor.stride()[:-1])


def _launch_norm(
    x: Tensor, gamma: Tensor, out: Tensor, *, kept: Tensor | None = None, added: Tensor | None = None, silu: bool
) -> None:
    b, t, h, w, c = x.shape
    block = block_of(c)
    memory, other = x if kept is None else kept, x if added is None else added
    assert other.stride() == x.stride(), "a kernel reads both at the same places"
    norm_silu_kernel[(triton.cdiv(b * h * w, block["ROWS"]),)](
        *(x, other, gamma, memory, out, b * h * w, t, h, w),
        *(*_in_pixels(x), *_in_pixels(memory), *_in_pixels(out)),
        **block,
        KEPT=0 if kept is None else kept.shape[1],
        SILU=silu,
        ADDS=added is not None,
        **OPTIONS,
    )


def vae_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """As `torch.ops.cosmos3.vae_norm`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch_norm(x, gamma, out, silu=False)
    return out


def picture_bytes(picture: Tensor) -> Tensor:
    """As `torch.ops.cosmos3.picture_bytes`."""
    b, c, t, h, w = picture.shape
    assert c == 3 and picture.is_contiguous()
    out = picture.new_empty(b, t, h, w, c, dtype=torch.uint8)
    unit, pixels = 16 // picture.element_size(), t * h * w
    grid = triton.cdiv(pixels, _ELEMENTS), b
    picture_bytes_kernel[grid](picture, out, pixels // unit, UNIT=unit, BLOCK=_ELEMENTS, **OPTIONS)
    return out


def norm_silu(x: Tensor, gamma: Tensor, *, out: Tensor) -> None:
    """As `torch.ops.cosmos3.norm_silu`."""
    _launch_norm(x, gamma, out, silu=True)


def norm_silu_after(x: Tensor, gamma: Tensor, kept: Tensor, *, out: Tensor) -> None:
    """As `torch.ops.cosmos3.norm_silu_after`."""
    _launch_norm(x, gamma, out, kept=kept, silu=True)


def add_norm_silu(x: Tensor, added: Tensor, gamma: Tensor, *, out: Tensor) -> None:
    """As `torch.ops.cosmos3.add_norm_silu`."""
    _launch_norm(x, gamma, out, added=added, silu=True)


def add_norm_silu_after(x: Tensor, added: Tensor, gamma: Tensor, kept: Tensor, *, out: Tensor) -> None:
    """As `torch.ops.cosmos3.add_norm_silu_after`."""
    _launch_norm(x, gamma, out, kept=kept, added=added, silu=True)


@triton.jit
def _rms_normed(x, weight, length, eps, dtype: tl.constexpr):
    """x [rows, channels] in float32 / its root mean square, rounded to `dtype`, times the weight, rounded."""
    scale = tl.div_rn(1.0, tl.sqrt_rn(length + eps))
    return ((x * scale[:, None]).to(dtype).to(tl.float32) * weight[None, :]).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "stride", "eps"])
def add_rms_norm_kernel(
    x,
    added,
    weight,
    total,
    out,
    rows,
    stride,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    ADDS: tl.constexpr,
):
    """The rows of x are `stride` x C elements apart; the rows of the other tensors are contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_C)
    there = (row < rows)[:, None] & (channel < C)[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    dense = row[:, None] * C + channel[None, :]
    value = tl.load(x + row[:, None] * stride * C + channel[None, :], mask=there, other=0.0).to(tl.float32)
    if ADDS:
        value += tl.load(added + dense, mask=there, other=0.0).to(tl.float32)
        tl.store(total + dense, value.to(dtype), mask=there)
        value = value.to(dtype).to(tl.float32)
    scales = tl.load(weight + channel, mask=channel < C, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(value * value, axis=1), C * 1.0)
    tl.store(out + dense, _rms_normed(value, scales, mean, eps, dtype).to(dtype), mask=there)


@triton.jit(do_not_specialize=["rows", "heads", "eps", "xt", "xh", "ot", "oh", "at"])
def norm_rotate_kernel(
    x,
    weight,
    cos,
    sin,
    out,
    rows,
    heads,
    eps,
    xt,
    xh,
    ot,
    oh,
    at,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program per ROWS of the `rows` = tokens x heads, each of 2 x HALF channels. Strides are in halves."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    wide = channel < HALF
    there = (row < rows)[:, None] & wide[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    token, head = row // heads, row % heads
    source = x + (token * xt + head * xh)[:, None] * HALF + channel[None, :]
    target = out + (token * ot + head * oh)[:, None] * HALF + channel[None, :]
    angle = (token * at)[:, None] * HALF + channel[None, :]
    a = tl.load(source, mask=there, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=there, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1), 2.0 * HALF)
    a = _rms_normed(a, tl.load(weight + channel, mask=wide, other=0.0).to(tl.float32), mean, eps, dtype)
    b = _rms_normed(b, tl.load(weight + HALF + channel, mask=wide, other=0.0).to(tl.float32), mean, eps, dtype)
    cos_a = tl.load(cos + angle, mask=there, other=0.0).to(tl.float32)
    cos_b = tl.load(cos + angle + HALF, mask=there, other=0.0).to(tl.float32)
    sin_a = tl.load(sin + angle, mask=there, other=0.0).to(tl.float32)
    sin_b = tl.load(sin + angle + HALF, mask=there, other=0.0).to(tl.float32)
    # Each product is rounded, then the sum is rounded, as by PyTorch's separate ops.
    left = (a * cos_a).to(dtype).to(tl.float32) - (b * sin_a).to(dtype).to(tl.float32)
    right = (b * cos_b).to(dtype).to(tl.float32) + (a * sin_b).to(dtype).to(tl.float32)
    tl.store(target, left.to(dtype), mask=there)
    tl.store(target + HALF, right.to(dtype), mask=there)


@triton.jit(do_not_specialize=["units"])
def picture_bytes_kernel(x, out, units, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Convert each clip's three planes of `units` x UNIT pixels to bytes, interleaved by pixel."""
    pixels = units.to(tl.int64) * UNIT
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < pixels
    clip = tl.program_id(1).to(tl.int64) * 3
    for colour in tl.static_range(3):
        y = tl.load(x + (clip + colour) * pixels + at, mask=there, other=0.0).to(tl.float32)
        y = (y * 0.5).to(x.dtype.element_ty).to(tl.float32)
        y = (y + 0.5).to(x.dtype.element_ty).to(tl.float32)
        y = tl.minimum(tl.maximum(y, 0.0), 1.0) * 255.0
        y = (y + 8388608.0) - 8388608.0  # 2^23: rounds to the nearest integer, ties to even
        tl.store(out + (clip * pixels + 3 * at) + colour, y.to(tl.uint8), mask=there)


@triton.jit(do_not_specialize=["units"])
def silu_mul_kernel(gate, up, units, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Overwrites `gate`, which has `units` x UNIT elements, so that 16 bytes are loaded at once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < units.to(tl.int64) * UNIT
    value = _silu(tl.load(gate + at, mask=there, other=0.0).to(tl.float32)).to(gate.dtype.element_ty)
    product = value.to(tl.float32) * tl.load(up + at, mask=there, other=0.0).to(tl.float32)
    tl.store(gate + at, product.to(gate.dtype.element_ty), mask=there)


def _launch_rms_norm(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, c = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = out if added is None else torch.empty_like(out)
    block = block_of(c)
    add_rms_norm_kernel[(triton.cdiv(rows, block["ROWS"]),)](
        *(x, x if added is None else added.contiguous(), weight, total, out, rows, x.stride(0) // c, eps),
        **block,
        ADDS=added is not None,
        **OPTIONS,
    )
    return total, out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `torch.ops.cosmos3.rms_norm`."""
    return _launch_rms_norm(x, None, weight, eps)[1]


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `torch.ops.cosmos3.add_rms_norm`."""
    return _launch_rms_norm(x, added, weight, eps)


def block_of_halves(channels: int) -> dict[str, int]:
    """As `block_of`, for rows of `channels` that are read as two halves."""
    half = block_of(channels // 2)
    return {"HALF": half["C"], "BLOCK": half["BLOCK_C"], "ROWS": max(1, half["ROWS"] // 2)}


def norm_rotate(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, *, out: Tensor) -> None:
    """As `torch.ops.cosmos3.norm_rotate`."""
    tokens, heads, c = x.shape
    block = block_of_halves(c)
    half = block["HALF"]
    strides = [stride // half for tensor in (x, out) for stride in tensor.stride()[:2]]
    norm_rotate_kernel[(triton.cdiv(tokens * heads, block["ROWS"]),)](
        *(x, weight, cos, sin, out, tokens * heads, heads, eps, *strides, cos.stride(0) // half),
        **block,
        **OPTIONS,
    )


def silu_mul(gate: Tensor, up: Tensor) -> None:
    """As `torch.ops.cosmos3.silu_mul`."""
    unit, grid = 16 // gate.element_size(), (triton.cdiv(gate.numel(), _ELEMENTS),)
    silu_mul_kernel[grid](gate, up, gate.numel() // unit, UNIT=unit, BLOCK=_ELEMENTS, **OPTIONS)
