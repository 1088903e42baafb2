"""What a kernel takes at least, told from its shapes: bytes, FLOPs, and the seconds of the roofline.

A kernel takes at least its FLOPs at the peak of the accelerator, and at least its bytes at the bandwidth of its
memory (Williams, Waterman and Patterson 2009). The larger one, summed over all kernels, is a bound from below. It
uses peaks; the plan's seconds use the share of a peak that published runs have reached.
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
    """Kernels of one name that one line launches."""

    name: str
    kind: str  # one of KINDS
    place: Place


class Work(NamedTuple):
    """Launches, what they read and write in bytes, their FLOPs, and their seconds by the roofline."""

    calls: int = 0
    moved_bytes: int = 0
    flops: int = 0
    seconds: float = 0.0

    def plus(self, other: Work, times: int = 1) -> Work:
        """The sum with `times` as much as `other`."""
        return Work(
            self.calls + times * other.calls,
            self.moved_bytes + times * other.moved_bytes,
            self.flops + times * other.flops,
            self.seconds + times * other.seconds,
        )


NO_WORK = Work()
Works = Mapping[Kernel, Work]


def summed(works: Iterable[Work]) -> Work:
    """All of `works` together."""
    total = NO_WORK
    for work in works:
        total = total.plus(work)
    return total


def by_kind(works: Works) -> dict[str, Work]:
    """The work of each of `KINDS`."""
    return {kind: summed(work for kernel, work in works.items() if kernel.kind == kind) for kind in KINDS}


class Roofline:
    """Adds up in `works` what is launched on `accelerator`."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.works: dict[Kernel, Work] = defaultdict(Work)
        self._flops_per_s = accelerator.flops_per_s
        self._bytes_per_s = accelerator.memory_bytes_per_s

    def add(self, kernel: Kernel, moved_bytes: int, flops: int, dtype: torch.dtype) -> None:
        """Count one launch, whose products are of `dtype`; a narrow one counts as bfloat16."""
        rate = self._flops_per_s[Dtype.float32 if dtype in (torch.float32, torch.float64) else Dtype.bfloat16]
        seconds = max(moved_bytes / self._bytes_per_s, flops / rate)
        self.works[kernel] = self.works[kernel].plus(Work(1, moved_bytes, flops, seconds))


def kind_of(func: Any) -> str:
    """The kind of a kernel, by what PyTorch's counter of FLOPs knows of it."""
    if func._overloadpacket not in flop_registry:
        return OTHER
    return CONVOLUTION if "conv" in func._overloadpacket.__name__ else PRODUCT


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """FLOPs of products, a multiplication and an addition each counted; 0 where PyTorch knows no formula."""
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def attention_flops(query: Tensor, key: Tensor, value: Tensor) -> int:
    """FLOPs of attention, counted whole also where it is causal, as the plan and `FlopCounterMode` count it."""
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))
