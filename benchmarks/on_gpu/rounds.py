"""Measures several ways to do the same work: interleaved rounds, medians, ratios to diffusers round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos3_pipeline.jobs.verify.distance import Distance
from on_gpu.found import Found
from on_gpu.setting import free, is_root, peak_of, seconds_of
from on_gpu.vaes import in_words

DIFFUSERS = "diffusers"
LEAST_ROUNDS, MOST_ROUNDS = 3, 9


@dataclass(frozen=True)
class Way:
    """One way to do a piece of work: all ranks `together`, or only the root while the other ranks wait."""

    run: Callable[[], Tensor]
    together: bool = False


def seconds_in_rounds(ways: Mapping[str, Way], device: torch.device, *, seconds: float) -> dict[str, list[float]]:
    """Seconds of each way in every round, after a first round to warm up.

    The order of the ways rotates, and every other round is backwards, so that no way always follows the same way.
    There are LEAST_ROUNDS rounds, or as many as fit into `seconds`, but at most MOST_ROUNDS.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    names, began, count, index = list(ways), time.perf_counter(), LEAST_ROUNDS, -1
    while index < count:
        start = index % len(names)
        for name in [*names[start:], *names[:start]][:: -1 if index % 2 else 1]:
            took = once(ways[name], device)
            if index >= 0:
                found[name].append(took)
        if index == 0:
            fitting = int(seconds / (time.perf_counter() - began))
            count = the_roots(max(LEAST_ROUNDS, min(MOST_ROUNDS, fitting)))
        began = time.perf_counter() if index < 0 else began
        index += 1
    return found


def once(way: Way, device: torch.device) -> float:
    """Run a way once. Returns the seconds of the slowest rank."""
    dist.barrier()
    took = seconds_of(way.run, device) if way.together or is_root() else 0.0
    slowest = torch.tensor(took)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def the_roots(value: int) -> int:
    """The root's `value`, on every rank."""
    shared = torch.tensor(value)
    dist.broadcast(shared, 0)
    return int(shared)


def spread(values: Sequence[float], digits: int) -> str:
    """Median, least and most, as text."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def write(
    found: Found, title: str, ways: Mapping[str, Way], device: torch.device, *, seconds: float
) -> dict[str, list[float]]:
    """Run the rounds. The root writes a row for each way: seconds, ratio, memory, and distance from diffusers."""
    measured = seconds_in_rounds(ways, device, seconds=seconds)
    reference: Tensor | None = None
    for name, way in ways.items():
        made: list[Tensor] = []
        peak = 0
        if way.together or is_root():
            peak = peak_of(lambda way=way, made=made: made.append(way.run()), device)  # type: ignore[misc]
        reference = made[0] if name == DIFFUSERS and made else reference
        if is_root() and reference is not None:
            distance = Distance(float(reference.max() - reference.min()))
            distance.add(reference, made[0])
            ratios = [theirs / own for theirs, own in zip(measured[DIFFUSERS], measured[name], strict=True)]
            found.row(
                f"{title}, {len(measured[name])} rounds",
                way=name,
                seconds=spread(measured[name], 3),
                **{"times as fast as diffusers": spread(ratios, 2)},
                **{"peak beyond weights": f"{peak / 1e9:.2f} GB"},
                **{"from diffusers": in_words(distance)},
            )
        made.clear()
        free(device)
        dist.barrier()
    return measured
