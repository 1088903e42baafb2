"""Declares the ops of this package, and chooses on an accelerator between a Triton kernel and plain ops."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

NAMESPACE = "cosmos3"
KERNELS = "cosmos3_pipeline.fused.triton_kernels"
# The channels of a pixel must take a multiple of this many bytes. Every view of pixels is then aligned, so that a
# kernel has only one compiled form, and its sums have one order.
ALIGNMENT = 16
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_log = logging.getLogger(__name__)


@cache
def triton_kernels() -> ModuleType | None:
    """The kernels in Triton; None if Triton is not installed, with one warning."""
    if find_spec("triton") is None:
        _log.warning(
            "Triton is not installed, so norms and activations run as plain ops, which go through memory several "
            "times; pip install triton"
        )
        return None
    return import_module(KERNELS)


def fused_by(device: torch.device) -> str:
    """The name of the backend that computes this package's ops on `device`, for a run's records."""
    if device.type != "cuda":
        return "plain ops"
    try:
        return f"triton {version('triton')}"
    except PackageNotFoundError:
        return "plain ops, because Triton is not installed"


def declare(schema: str, plain: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Declare `torch.ops.cosmos3.<name>` with a `schema` such as "name(Tensor x) -> Tensor".

    plain: the op made of PyTorch's ops, for CPUs and for accelerators without Triton.
    fake: makes the outputs for tensors without values.
    The kernel is the function with the op's name in `triton_kernels`.
    """
    name = schema.partition("(")[0]
    torch.library.define(f"{NAMESPACE}::{name}", schema.removeprefix(name))
    torch.library.impl(f"{NAMESPACE}::{name}", "CPU", plain)
    torch.library.impl(f"{NAMESPACE}::{name}", "CUDA", _on_cuda(name, plain))
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)


def _on_cuda(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)
    def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kernels = triton_kernels() if _has_kernel(x) else None
        if kernels is None:
            return plain(x, *args, **kwargs)
        with torch.cuda.device(x.device):  # Triton launches on the current device
            return getattr(kernels, name)(x, *args, **kwargs)

    return run


def _has_kernel(x: torch.Tensor) -> bool:
    """Whether a kernel accepts x. Its last dim has the channels of a pixel or token."""
    return x.dtype in _DTYPES and x.stride(-1) == 1 and x.shape[-1] * x.element_size() % ALIGNMENT == 0
