"""Runs strategies on one input of the VAE, and measures the cost of each and its distance from `replicated`."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.jobs.metrics import peak_bytes, reset_peak
from cosmos3_pipeline.jobs.verify import DENOISE, EVERY_PASS, REFERENCE, Chosen
from cosmos3_pipeline.jobs.verify.distance import PICTURE_RANGE, Distance, exactness_of
from cosmos3_pipeline.jobs.verify.picture import Row
from cosmos3_pipeline.planning.vae import VaePlan
from cosmos3_pipeline.stages.likeness import ssim
from cosmos3_pipeline.vae.pixels import Pixels
from cosmos3_pipeline.vae.program import Direction
from cosmos3_pipeline.vae.strategy import Exactness, Runner
from cosmos3_pipeline.vae.weights import BoundVae, ModuleWeights

LEVELS = 255.0


@dataclass(frozen=True)
class Result:
    """The result of a strategy, in CPU memory, and its cost.

    values: for decode the float frames [B, 3, H, W], on the root; for encode the moments as one tensor, on every
    rank. frames: the uint8 frames [H, W, 3] that a run streams, on the root. cost: the seconds of the slowest
    rank, and the measurements of every rank.
    """

    values: list[Tensor]
    frames: list[Tensor]
    cost: dict[str, Any]


class Trial:
    """Runs strategies on `given`: latents [1, z_dim, T, h, w] or a picture [1, 3, F, H, W].

    Strategies are compared with `reference`, the result of the plan `alone`. All ranks call it together.
    """

    def __init__(
        self, direction: Direction, given: Tensor, autoencoder: AutoencoderKLWan, comm: Comm, alone: VaePlan
    ) -> None:
        self._direction: Direction = direction
        self._given = given
        self._autoencoder = autoencoder
        self._comm = comm
        self._float32: list[Tensor] | None = None
        self._alone = alone
        self.reference = self._run(alone)

    def check(self, one: Chosen) -> tuple[dict[str, Any], Row | None]:
        """The report's entry for a strategy, and its row of verify.png. Only the root may use them."""
        plan = one.plan.plan
        result = self._run(one.plan)
        # Encode gives every rank the latents, and they must be the same on all ranks.
        digests = self._comm.agree(_digest(result.values) if self._direction == "encode" else "")
        if plan.exactness == Exactness.ROUNDING and self._given.dtype != torch.float32:
            self._make_float32()
        if not self._comm.is_root:
            return {}, None
        found = distance(self.reference.values, result.values, self._range)
        reached = self._reached(found, result)
        missed = None
        if len(set(digests)) > 1:
            others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
            reached, missed = None, f"ranks {others} have other latents than rank 0"
        else:
            missed = missed_by(plan.exactness, reached, found)
        check = {
            "direction": self._direction,
            "strategy": plan.strategy,
            "settings": one.settings,
            "declared": plan.exactness.value,
            "reached": None if reached is None else reached.value,
            "passed": missed is None,
            "missed": missed,
            "values": _numbers(found),
            **result.cost,
        }
        likeness, row = compared(plan.strategy, REFERENCE, self.reference, result)
        return check | likeness, row

    @property
    def _range(self) -> float:
        if self._direction == "decode":
            return PICTURE_RANGE
        (moments,) = self.reference.values
        return float(moments.max() - moments.min())

    def _reached(self, found: Distance, result: Result) -> Exactness | None:
        if self._float32 is None:
            return exactness_of(found)
        return exactness_of(
            found,
            float32=distance(self._float32, result.values, self._range),
            reference_float32=distance(self._float32, self.reference.values, self._range),
        )

    def _make_float32(self) -> None:
        """Compute the reference in float32, once. Rounding in a narrower dtype is judged by distances from it."""
        if self._comm.is_root and self._float32 is None:
            bound = self._bound(torch.float32)
            runner = self._alone.strategy.runner(bound, self._comm, self._direction)
            self._float32 = self._values(runner, torch.float32)
        self._comm.agree(None)

    def _bound(self, dtype: torch.dtype) -> BoundVae:
        weights = ModuleWeights(self._autoencoder)
        return BoundVae(self._autoencoder.config, weights, dtype=dtype, device=self._given.device)

    def _run(self, planned: VaePlan) -> Result:
        """Run a strategy twice: first for float values, which is also the warm-up, and then timed as in a run."""
        bound = self._bound(self._given.dtype)
        runner = planned.strategy.runner(bound, self._comm, self._direction)
        with self._comm.run():
            values = self._values(runner, self._given.dtype)
        self._comm.agree(None)  # a barrier, so that no rank's seconds include another rank's warm-up
        device, before = self._given.device, self._comm.ledger.snapshot()
        reset_peak(device)
        started = time.perf_counter()
        with self._comm.run():
            if self._direction == "decode":
                chunks = self._stream(runner, self._given, "uint8")
                frames = [frame for chunk in chunks for frame in chunk[0].unbind()]
            else:
                runner.encode(self._given)
                frames = []
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds, peak = time.perf_counter() - started, peak_bytes(device)
        counted, share = self._comm.ledger.since(before), planned.plan.shares[self._comm.rank]
        own = {
            "rank": self._comm.rank,
            "seconds": seconds,
            "peak_bytes": peak,
            "sent_bytes": counted.sent_bytes,
            "sent_messages": counted.sent_messages,
            "planned_bytes": share.sent_bytes,
            "planned_messages": share.sent_messages,
        }
        ranks = self._comm.agree(own)
        return Result(values, frames, {"seconds": max(rank["seconds"] for rank in ranks), "ranks": ranks})

    def _values(self, runner: Runner, dtype: torch.dtype) -> list[Tensor]:
        given = self._given.to(dtype)
        if self._direction == "encode":
            return [runner.encode(given).cpu()]
        return [frame for chunk in self._stream(runner, given, "float") for frame in chunk.unbind(2)]

    def _stream(self, runner: Runner, z: Tensor, pixels: Pixels) -> Iterator[Tensor]:
        """Yield the chunks on the CPU, on the root. The other ranks take part and yield nothing."""
        for chunk in runner.stream(z, pixels=pixels):
            if self._comm.is_root:
                yield chunk.cpu()


def check_skipping(settings: Sequence[str], every: Result, result: Result) -> tuple[dict[str, Any], Row | None]:
    """The report's entry for a run that skips passes by `settings`, and its row of verify.png.

    `every` is the clip of the same run with every pass. Only the root has frames to compare.
    """
    if not every.values:
        return {}, None
    found, name = distance(every.values, result.values, PICTURE_RANGE), " ".join(settings)
    reached, declared = exactness_of(found), Exactness.APPROXIMATE
    missed = missed_by(declared, reached, found)
    check = {
        "direction": DENOISE,
        "strategy": name,
        "settings": {},
        "declared": declared.value,
        "reached": None if reached is None else reached.value,
        "passed": missed is None,
        "missed": missed,
        "values": _numbers(found),
    }
    likeness, row = compared(name, EVERY_PASS, every, result)
    return check | likeness, row


def missed_by(declared: Exactness, reached: Exactness | None, found: Distance) -> str | None:
    """Why a result at the distance `found` misses its declaration. None if it is as exact as declared."""
    if reached is not None and reached.satisfies(declared):
        return None
    return (
        f"it declares {declared} and is {reached or 'another picture'}: "
        f"{found.psnr:.1f} dB, at most {found.max_abs:.3g} off on a range of {found.value_range:.3g}"
    )


def compared(name: str, beside: str, reference: Result, result: Result) -> tuple[dict[str, Any], Row | None]:
    """The likeness of the frames that a run streams, and the row of verify.png. Without frames both are empty."""
    pairs = list(zip(reference.frames, result.frames, strict=True))
    if not pairs:
        return {"levels": None, "ssim": None}, None
    return {
        "levels": _numbers(distance(reference.frames, result.frames, LEVELS)),
        "ssim": sum(ssim(a.numpy(), b.numpy()) for a, b in pairs) / len(pairs),
    }, Row.worst(name, beside, pairs)


def distance(reference: list[Tensor], other: list[Tensor], value_range: float) -> Distance:
    """The distance between two results, tensor by tensor."""
    found = Distance(value_range)
    for theirs, ours in zip(reference, other, strict=True):
        found.add(theirs, ours)
    return found


def _numbers(found: Distance) -> dict[str, float | None]:
    """The numbers for JSON, which has no infinity and no NaN. The PSNR of equal results is null, and so is NaN."""
    numbers = {"max": found.max_abs, "mean": found.mean_abs, "psnr_db": found.psnr, "range": found.value_range}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _digest(tensors: list[Tensor]) -> str:
    parts = (t.contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in tensors)
    return hashlib.sha256(b"".join(parts)).hexdigest()
