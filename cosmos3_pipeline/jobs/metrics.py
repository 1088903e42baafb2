"""The measurements in metrics.json: seconds and peak bytes per stage and rank, bytes on the wire, versions."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from cosmos3_pipeline.denoise.attention_kernel import chosen
from cosmos3_pipeline.distributed import host
from cosmos3_pipeline.distributed.ledger import Ledger
from cosmos3_pipeline.fused.backend import fused_by

SCHEMA_VERSION = 1
PACKAGES = ("cosmos3-pipeline", "torch", "diffusers", "transformers", "hydra-core", "av")


@dataclass
class StageMeasure:
    """The measurements of one stage on one rank.

    `peak_bytes` is resident memory of the process on cpu, and allocated memory on cuda. `wire` counts calls and
    bytes by kind, as the ledger names them.
    """

    seconds: float = 0.0
    peak_bytes: int = 0
    wire: dict[str, dict[str, int]] = field(default_factory=dict)


class Meter:
    """Measures the stages of this rank, one after the other."""

    def __init__(self, device: torch.device, stages: Sequence[str], ledgers: Sequence[Ledger]) -> None:
        self.device = device
        self.stages = {name: StageMeasure() for name in stages}
        self._ledgers = ledgers  # may grow while a stage runs, because the VAE adds its ledger

    @contextmanager
    def stage(self, name: str, /, *, portion: bool = False) -> Iterator[StageMeasure]:
        """Measure the time of the block and its peak memory. Peaks of earlier stages do not count.

        A stage ends when the device has computed all of it. After a `portion` of a stage the device is not waited
        for.
        """
        measure = self.stages[name]
        before = {id(ledger): ledger.snapshot() for ledger in self._ledgers}
        reset_peak(self.device)
        started = time.perf_counter()
        yield measure
        if self.device.type == "cuda" and not portion:
            torch.cuda.synchronize(self.device)
        measure.seconds += time.perf_counter() - started
        measure.peak_bytes = max(measure.peak_bytes, peak_bytes(self.device))
        for ledger in self._ledgers:
            for kind, count in ledger.since(before.get(id(ledger), Ledger())).counts.items():
                total = measure.wire.setdefault(kind, {"calls": 0, "bytes": 0})
                total["calls"] += count.calls
                total["bytes"] += count.bytes

    @property
    def peak_bytes(self) -> int:
        """The largest peak of all stages."""
        return max(stage.peak_bytes for stage in self.stages.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values, to gather over the ranks and write as JSON."""
        return {name: asdict(stage) for name, stage in self.stages.items()}


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        host.reset_peak()


def held_bytes(device: torch.device) -> int:
    """The bytes that this process holds on `device` now."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else host.resident_bytes()


def peak_bytes(device: torch.device) -> int:
    """The most bytes held since the last `reset_peak`."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else host.peak_bytes()


def combine(per_rank: list[dict[str, Any]]) -> dict[str, Any]:
    """For each stage or component: the seconds of the slowest rank, and the measurements of each rank, in order.

    Some components, such as the sound tokenizer, are loaded by one rank only. They have the values of that rank.
    """
    return {
        name: {
            "seconds": max(rank[name]["seconds"] for rank in per_rank if name in rank),
            "ranks": [{"rank": i, **rank[name]} for i, rank in enumerate(per_rank) if name in rank],
        }
        for name in dict.fromkeys(name for rank in per_rank for name in rank)
    }


def kernels(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The kernels for attention in `dtype` and for norms on `device`. Measurements depend on them."""
    return {"attention": chosen(device, dtype), "norms": fused_by(device)}


def versions() -> dict[str, str]:
    """The package versions on which measurements depend."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
