"""Which kernel computes attention: chosen here for each kind of accelerator, and told to a run's records."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HALF = (torch.bfloat16, torch.float16)
HOPPER = 9  # major compute capability
FLASH_3 = "flash_attn_interface"  # the module of FlashAttention-3, which is for Hopper alone
# PyTorch's kernels in the order in which they are tried; the first that takes the shapes runs. From Hopper on
# cuDNN's uses the matrix instructions of the chip, while FlashAttention-2 uses those of Ampere.
_SINCE_HOPPER = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
_BEFORE_HOPPER = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
_OTHERS = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """Attention of query [n, heads, D] over key and value [m, groups, D], heads a multiple; returns [n, heads, D].

    `causal` is for n == m.
    """
    flash = flash_attention_3() if _takes_flash_3(query.device, query.dtype) else None
    if flash is not None:
        found = flash(query[None], key[None], value[None], causal=causal)
        attended: Tensor = found[0] if isinstance(found, tuple) else found  # earlier versions give the lengths too
        return attended[0]
    with sdpa_kernel(list(order(query.device)), set_priority=True) if query.is_cuda else nullcontext():
        attended = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            is_causal=causal,
            enable_gqa=True,
        )
    return attended[0].transpose(0, 1)


def partial_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """As `attention`, over a part of the keys: the result, and what merges it with those over the others.

    That is [n, heads], the logarithm of the sum of each query's exponentials, in float32 (float64 of float64).
    They are PyTorch's own kernels, by the names by which its context parallelism calls them, because the public
    function keeps the sums to itself. cuDNN's and FlashAttention-3 are not asked for theirs.
    """
    heads = [one.transpose(0, 1)[None] for one in (query, key, value)]
    if query.device.type == "cpu":
        attended, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads)
    elif query.dtype in HALF:
        attended, sums, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*heads)
    else:  # it knows no groups, and pads its rows of sums
        each = query.shape[1] // key.shape[1]
        heads[1:] = (one.repeat_interleave(each, 1) for one in heads[1:])
        attended, sums, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(*heads, None, True)
    return attended[0].transpose(0, 1), sums[0, :, : len(query)].transpose(0, 1)


def merged(parts: Tensor, sums: Tensor) -> Tensor:
    """Attention [..., D] over all keys out of `parts` [parts, ..., D], each over some of them.

    `sums` [parts, ...] are those of `partial_attention`, in whose dtype the parts are weighed and added.
    """
    weights = sums.softmax(0).unsqueeze(-1)
    total = weights[0] * parts[0]
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        total += weight * part
    return total.to(parts.dtype)


def chosen(device: torch.device, dtype: torch.dtype) -> str:
    """What computes attention in `dtype` on `device`, for a run's records."""
    if _takes_flash_3(device, dtype) and flash_attention_3() is not None:
        try:
            return f"{FLASH_3} {version('flash_attn_3')}"
        except PackageNotFoundError:  # built where it lies
            return FLASH_3
    if device.type != "cuda":
        return "scaled_dot_product_attention"
    names = (backend.name.removesuffix("_ATTENTION").lower() for backend in order(device))
    return f"scaled_dot_product_attention by the first that can of {', '.join(names)}"


@cache
def flash_attention_3() -> Callable[..., Any] | None:
    """FlashAttention-3 where it is installed: queries, keys, values [B, n, heads, D] and `causal`."""
    try:
        found: Callable[..., Any] = import_module(FLASH_3).flash_attn_func
    except ImportError:
        return None
    return found


@cache
def order(device: torch.device) -> tuple[SDPBackend, ...]:
    """PyTorch's kernels for an accelerator, in the order in which they are tried."""
    first = _SINCE_HOPPER if _capability(device) >= HOPPER else _BEFORE_HOPPER
    return (*first, *_OTHERS)


def _takes_flash_3(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in HALF and _capability(device) == HOPPER


@cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]
