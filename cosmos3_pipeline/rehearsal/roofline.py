"""The least time of a kernel, from its shapes: bytes, FLOPs, and the seconds of the roofline.

A kernel needs at least FLOPs / the accelerator's peak, and at least bytes / its memory bandwidth (Williams,
Waterman and Patterson 2009). The larger of both, summed over all kernels, is a lower bound of the time. It uses
peaks, while the plan's seconds use the share of a peak that published runs have reached.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from cosmos3_pipeline.config.schema import Dtype
from cosmos3_pipeline.planning.hardware import Accelerator
from cosmos3_pipeline.rehearsal.findings import KINDS
from cosmos3_pipeline.rehearsal.places import Place

CONVOLUTION, PRODUCT, OTHER = KINDS


class Kernel(NamedTuple):
    """All kernels with one name that one line launches."""

    name: str
    kind: str  # one of KINDS
    place: Place


class Work(NamedTuple):
    """Number of launches, bytes read and written, FLOPs, and seconds by the roofline."""

    calls: int = 0
    moved_bytes: int = 0
    flops: int = 0
    seconds: float = 0.0

    def plus(self, other: Work, times: int = 1) -> Work:
        """The sum of this and `times` x `other`."""
        return Work(
            self.calls + times * other.calls,
            self.moved_bytes + times * other.moved_bytes,
            self.flops + times * other.flops,
            self.seconds + times * other.seconds,
        )


NO_WORK = Work()
Works = Mapping[Kernel, Work]


def summed(works: Iterable[Work]) -> Work:
    """The sum of `works`."""
    total = NO_WORK
    for work in works:
        total = total.plus(work)
    return total


def by_kind(works: Works) -> dict[str, Work]:
    """The work of each of `KINDS`."""
    return {kind: summed(work for kernel, work in works.items() if kernel.kind == kind) for kind in KINDS}


class Roofline:
    """Sums up in `works` the kernels that are launched on `accelerator`."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.works: dict[Kernel, Work] = defaultdict(Work)
        self._flops_per_s = accelerator.flops_per_s
        self._bytes_per_s = accelerator.memory_bytes_per_s

    def add(self, kernel: Kernel, moved_bytes: int, flops: int, dtype: torch.dtype) -> None:
        """Count one launch with products in `dtype`; dtypes narrower than float32 count as bfloat16."""
        rate = self._flops_per_s[Dtype.float32 if dtype in (torch.float32, torch.float64) else Dtype.bfloat16]
        seconds = max(moved_bytes / self._bytes_per_s, flops / rate)
        self.works[kernel] = self.works[kernel].plus(Work(1, moved_bytes, flops, seconds))


def kind_of(func: Any) -> str:
    """The kind of a kernel, according to PyTorch's FLOP counter."""
    if func._overloadpacket not in flop_registry:
        return OTHER
    return CONVOLUTION if "conv" in func._overloadpacket.__name__ else PRODUCT


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """FLOPs of a matrix product or convolution, by PyTorch's formula. 0 if PyTorch has no formula for `func`.

    A multiplication counts as one FLOP, and an addition as another.
    """
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def attention_flops(query: Tensor, key: Tensor, value: Tensor) -> int:
    """FLOPs of attention. Causal attention counts as full attention, as in the plan and `FlopCounterMode`."""
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))
