"""One case: every contestant in interleaved rounds, then once more for its memory, messages and result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cosmos3_pipeline.jobs.bench.contestants import Contestant, Factory, Unavailable
from cosmos3_pipeline.jobs.bench.given import Given
from cosmos3_pipeline.jobs.bench.suite import ALONE, DIFFUSERS, DISTVAE, TILED, Case
from cosmos3_pipeline.jobs.verify.distance import Distance
from cosmos3_pipeline.plugin_kit.live_bytes import LiveBytes

# What a peer raises for what it cannot do: its row says so, and the others go on.
PEER_ERRORS = (ImportError, AssertionError, ValueError, RuntimeError)
PEERS = (TILED, DISTVAE)
# More rounds than so many times those asked for say little more, however short they are.
MOST_TIMES_ROUNDS = 4


@dataclass
class Measured:
    """What one contestant did on this rank; seconds per round, on the clock and of the processor."""

    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    sent_bytes: int | None = None
    sent_messages: int | None = None
    weight_bytes: int | None = None


class Trial:
    """A case and its contestants, made and warmed up. All ranks make one and call its methods together."""

    def __init__(self, case: Case, factory: Factory, given: Given) -> None:
        self._case = case
        self._given = given
        self._factory = factory
        self._world = factory.world
        self._absent: dict[str, str] = {}
        self._contestants: dict[str, Contestant | None] = {}
        self._measured: dict[str, Measured] = {}
        self._results: dict[str, Tensor] = {}
        for name in case.contestants:
            contestant, why = self._admitted(name)
            reasons = [reason for reason in self._world.comm.agree(why) if reason is not None]
            if reasons:
                self._absent[name] = reasons[0]
            else:
                self._contestants[name] = contestant
                self._measured[name] = Measured()

    @property
    def absent(self) -> int:
        """How many contestants cannot take part."""
        return len(self._absent)

    def _admitted(self, name: str) -> tuple[Contestant | None, str | None]:
        """The contestant after a first run, or why there is none; neither on a rank that only waits."""
        if name in ALONE and not self._world.is_root:
            return None, None
        try:
            contestant = self._factory.make(name)
            # Whole if it is timed: what only its later chunks use first would count in the first round.
            contestant.run(self._given if self._case.timed else self._given.short())
        except Unavailable as error:
            return None, str(error)
        except PEER_ERRORS as error:
            if name not in PEERS:
                raise
            return None, f"{type(error).__name__}: {error}"
        return contestant, None

    def rounds(self, least: int, seconds: float, advance: Callable[[], None]) -> None:
        """Every contestant once a round, in an order that rotates, and backwards every other round.

        The result of none is kept.

        Runs `least` rounds, or as many as fit into `seconds` going by the first, up to `MOST_TIMES_ROUNDS` times
        that. Each contestant has `least` calls of `advance`, spread over them.
        """
        names = list(self._contestants)
        began = time.perf_counter()
        count, index = least, 0
        while index < count:
            start = index % len(names)
            for name in (names[start:] + names[:start])[:: -1 if index % 2 else 1]:
                _, clock, processor = self._world.timed(self._work(name))
                self._measured[name].seconds.append(clock)
                self._measured[name].processor_seconds.append(processor)
                if index == 0 or _steps(index, least, count) > _steps(index - 1, least, count):
                    advance()
            if index == 0:
                took = self._world.comm.agree(time.perf_counter() - began)[0]
                count = max(least, min(MOST_TIMES_ROUNDS * least, math.ceil(seconds / took)))
            index += 1

    def once_more(self, advance: Callable[[], None]) -> None:
        """Every contestant once, its tensors and messages counted and its result kept on the root."""
        for name, contestant in self._contestants.items():
            self._world.wait()
            if contestant is not None and contestant.roofline is None:
                measured, ledger = self._measured[name], contestant.ledger
                before = None if ledger is None else ledger.snapshot()
                with LiveBytes([*contestant.known, self._given.tensor]) as live:
                    result = contestant.run(self._given)
                measured.peak_bytes = live.peak
                if ledger is not None and before is not None:
                    counted = ledger.since(before)
                    measured.sent_bytes, measured.sent_messages = counted.sent_bytes, counted.sent_messages
                if contestant.weights is not None:
                    measured.weight_bytes = contestant.weights.nbytes
                if result is not None and self._world.is_root:
                    self._results[name] = result
            advance()

    def _work(self, name: str) -> Callable[[], object]:
        contestant = self._contestants[name]
        return (lambda: None) if contestant is None else (lambda: contestant.run(self._given))

    def report(self) -> dict[str, Any]:
        """For bench.json; whole on the root."""
        case, s = self._case, self._case.shape
        everyone = self._world.comm.agree(self._measured)
        float32 = self._in_float32() if self._world.is_root else None
        return {
            "title": case.title,
            "call": case.call,
            "dtype": case.dtype,
            "latent_frames": s.frames,
            "latent_rows": s.rows,
            "latent_cols": s.cols,
            "ranks": self._world.comm.size,
            "contestants": {
                name: self._row(contestant, [rank[name] for rank in everyone], float32)
                for name, contestant in self._contestants.items()
                if contestant is not None
            },
            "absent": self._absent,
        }

    def _row(self, contestant: Contestant, ranks: list[Measured], float32: Tensor | None) -> dict[str, Any]:
        """What all ranks measured of a contestant; a round takes as long as its slowest rank."""
        ranks = ranks if contestant.everywhere else ranks[:1]
        shares = contestant.plan and contestant.plan.shares
        if shares and len(shares) == 1:
            shares *= len(ranks)  # on every rank by itself
        seconds = [max(times) for times in zip(*(r.seconds for r in ranks), strict=True)]
        row: dict[str, Any] = {
            "ranks": len(ranks),
            "note": contestant.note,
            "seconds": seconds,
            "clock_seconds": seconds,
            "processor_seconds": [max(t) for t in zip(*(r.processor_seconds for r in ranks), strict=True)],
        }
        if contestant.roofline is not None:
            # The same in every round: what the library can do is the best that it ever did.
            roofline = contestant.roofline
            return {**row, "seconds": [roofline.seconds] * len(seconds), "note": roofline.note}
        result, theirs = self._results.get(contestant.name), self._results.get(DIFFUSERS)
        return {
            **row,
            "peak_bytes": [r.peak_bytes for r in ranks],
            "planned_peak_bytes": shares and [share.activation_bytes for share in shares],
            "weight_bytes": shares and [r.weight_bytes for r in ranks],
            "planned_weight_bytes": shares and [share.weight_bytes for share in shares],
            "sent_bytes": shares and [r.sent_bytes for r in ranks],
            "sent_messages": shares and [r.sent_messages for r in ranks],
            "max_abs": None if result is None or theirs is None else distance(theirs, result).max_abs,
            "rms_float32": None if result is None or float32 is None else distance(float32, result).rms,
        }

    def _in_float32(self) -> Tensor | None:
        """diffusers' result in float32 of the same input; None where the case is in float32 or keeps no result."""
        if self._case.dtype == "float32" or self._case.call not in ("decode", "encode"):
            return None
        vae, given = self._factory.autoencoders.model(torch.float32), self._given.tensor.float()
        if self._case.call == "decode":
            picture: Tensor = vae.decode(given).sample
            return picture
        latents: Tensor = vae.encode(given).latent_dist.mode()
        return latents


def _steps(round_: int, least: int, count: int) -> int:
    """How many of the calls of `advance` after the first belong to the rounds after it, up to `round_`."""
    return round_ * (least - 1) // (count - 1)


def distance(reference: Tensor, other: Tensor) -> Distance:
    """Between two results of one shape."""
    found = Distance()
    found.add(reference, other)
    return found
