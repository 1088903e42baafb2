"""The choice of the attention kernel for each kind of accelerator, and its name for a run's records."""

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
FLASH_3 = "flash_attn_interface"  # the module of FlashAttention-3, which runs on Hopper only
# PyTorch's kernels in the order in which they are tried; the first that accepts the shapes runs. On Hopper and
# later chips cuDNN comes first, because it uses their matrix instructions, while FlashAttention-2 uses Ampere's.
_SINCE_HOPPER = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
_BEFORE_HOPPER = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
_OTHERS = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """Attention of query [n, heads, D] over key and value [m, groups, D]; returns [n, heads, D].

    `heads` is a multiple of `groups`. `causal` requires n == m.
    """
    flash = flash_attention_3() if _takes_flash_3(query.device, query.dtype) else None
    if flash is not None:
        found = flash(query[None], key[None], value[None], causal=causal)
        attended: Tensor = found[0] if isinstance(found, tuple) else found  # older versions also return lengths
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
    """Attention over a subset of the keys: the result [n, heads, D] and its log-sum-exp [n, heads].

    `merged` combines results over several subsets by their log-sum-exp, which is float32 (float64 for float64).
    The public PyTorch function does not return the log-sum-exp. Therefore the kernels are called by the internal
    names that PyTorch's context parallelism uses. cuDNN and FlashAttention-3 are not used here.
    """
    heads = [one.transpose(0, 1)[None] for one in (query, key, value)]
    if query.device.type == "cpu":
        attended, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads)
    elif query.dtype in HALF:
        attended, sums, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*heads)
    else:  # this kernel has no grouped keys, and pads the rows of its log-sum-exp
        each = query.shape[1] // key.shape[1]
        heads[1:] = (one.repeat_interleave(each, 1) for one in heads[1:])
        attended, sums, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(*heads, None, True)
    return attended[0].transpose(0, 1), sums[0, :, : len(query)].transpose(0, 1)


def merged(parts: Tensor, sums: Tensor) -> Tensor:
    """Attention [..., D] over all keys, merged from `parts` [parts, ..., D], each over a subset of the keys.

    `sums` [parts, ...] is the log-sum-exp of each part, from `partial_attention`. Its dtype is used for the sum.
    """
    weights = sums.softmax(0).unsqueeze(-1)
    total = weights[0] * parts[0]
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        total += weight * part
    return total.to(parts.dtype)


def chosen(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the attention kernel for `dtype` on `device`, for a run's records."""
    if _takes_flash_3(device, dtype) and flash_attention_3() is not None:
        try:
            return f"{FLASH_3} {version('flash_attn_3')}"
        except PackageNotFoundError:  # used from its source folder, without installation
            return FLASH_3
    if device.type != "cuda":
        return "scaled_dot_product_attention"
    names = (backend.name.removesuffix("_ATTENTION").lower() for backend in order(device))
    return f"scaled_dot_product_attention by the first that can of {', '.join(names)}"


@cache
def flash_attention_3() -> Callable[..., Any] | None:
    """FlashAttention-3's function of query, key, value [B, n, heads, D] and `causal`; None if not installed."""
    try:
        found: Callable[..., Any] = import_module(FLASH_3).flash_attn_func
    except ImportError:
        return None
    return found


@cache
def order(device: torch.device) -> tuple[SDPBackend, ...]:
    """PyTorch's kernels for the accelerator `device`, in the order in which they are tried."""
    first = _SINCE_HOPPER if _capability(device) >= HOPPER else _BEFORE_HOPPER
    return (*first, *_OTHERS)


def _takes_flash_3(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in HALF and _capability(device) == HOPPER


@cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]
