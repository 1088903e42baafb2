"""Observes one case on one rank: results, messages, weights. Runs in a rank."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.jobs.verify.distance import PICTURE_RANGE, Distance, exactness_of
from cosmos3_pipeline.plugin_kit.cases import CLIP, DIRECTIONS, Case
from cosmos3_pipeline.plugin_kit.live_bytes import LiveBytes
from cosmos3_pipeline.plugin_kit.subject import Subject
from cosmos3_pipeline.vae.parallel_vae import ParallelVAE
from cosmos3_pipeline.vae.pixels import to_uint8
from cosmos3_pipeline.vae.program import Direction
from cosmos3_pipeline.vae.strategy import Exactness, Strategy
from cosmos3_pipeline.vae.weights import ModuleWeights, WeightSource
from cosmos3_plugins.replicated import Replicated

SEED, OTHER_SEED = 5, 6


@dataclass
class Call:
    """One call on one rank.

    error: the traceback of the exception.
    shapes, digest: the shapes of the returned tensors, and a digest of their bytes.
    max_abs, psnr, equal: the distance from the reference, and whether every bit is equal.
    reached: the exactness of the result; None for another picture.
    counted, planned: (bytes, messages) sent.
    wire: (bytes, messages) by kind.
    collectives: each collective that was called, in order.
    """

    error: str | None = None
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    digest: str = ""
    max_abs: float = 0.0
    psnr: float = 0.0
    equal: bool = False
    reached: Exactness | None = None
    counted: tuple[int, int] = (0, 0)
    planned: tuple[int, int] = (0, 0)
    wire: dict[str, tuple[int, int]] = field(default_factory=dict)
    collectives: list[tuple[Any, ...]] = field(default_factory=list)


@dataclass
class Seen:
    """All observations of one rank.

    calls: decode, again, stream and encode, if strategy and case support them; the first failure ends the list.
    weights: for each direction, (bytes of weights that the strategy loaded, bytes that the plan says).
    """

    calls: dict[str, Call] = field(default_factory=dict)
    weights: dict[str, tuple[int, int]] = field(default_factory=dict)


# (case, number of ranks) -> the observations of every rank, or None if the plan refuses the case.
Observed = Callable[[Case, int], list[Seen] | None]


def observe(subject: Subject, case: Case) -> Seen:
    """All calls of `subject` on `case`, compared with `replicated`, which this rank computes by itself."""
    strategy, seen = subject.build(), Seen()
    model = case.autoencoder()
    narrow = getattr(torch, case.dtype) != torch.float32
    exact = ParallelVAE(model, Replicated(), Replicated()) if narrow else None
    model = case.autoencoder().to(getattr(torch, case.dtype)) if narrow else model
    reference = ParallelVAE(model, Replicated(), Replicated())
    weights = _CountingWeights(model)
    vae = vae_with(strategy, model, weights=weights)

    def held(name: str, run: Callable[[ParallelVAE, Tensor], Tensor], given: Tensor) -> Tensor:
        """Make one call and compare its result with the reference."""
        expected = run(reference, given)
        expected32 = None if exact is None else run(exact, given)
        call, (result,) = _make(seen, name, vae, lambda: [run(vae, given)])
        _hold(call, result, expected, expected32, picture=name != "encode")
        return result

    # After a failed call the ranks may be at different points, so no further call is made.
    with suppress(_Failed):
        if "decode" in strategy.directions:
            held("decode", decode, case.latents(SEED))
            # Another clip with the same runner, so that leftovers of the first clip are noticed.
            other = case.latents(OTHER_SEED)
            picture = held("again", decode, other)
            if case.batch == 1:
                call, chunks = _make(seen, "stream", vae, lambda: vae.decode_stream(other.to(vae.dtype)))
                if chunks:
                    _hold_stream(call, chunks, to_uint8(picture)[0])
        if "encode" in strategy.directions:
            held("encode", encode, case.picture(SEED))
        if case == CLIP:
            for direction in DIRECTIONS:
                if direction in strategy.directions:
                    _weigh(seen, vae, direction, case)
        names: tuple[tuple[str, Direction], ...] = (("stream", "decode"), ("encode", "encode"))
        for name, direction in names:
            if name in seen.calls:
                share = vae.plan(direction, case.shape).shares[vae.comm.rank]
                seen.calls[name].planned = (share.sent_bytes, share.sent_messages)
                wanted = {weight.name for weight in case.program(direction).weights()}
                seen.weights[direction] = (weights.taken(wanted), share.weight_bytes)
    return seen


def _weigh(seen: Seen, vae: ParallelVAE, direction: Direction, case: Case) -> None:
    """Record the peak of live bytes on this rank, and the plan's prediction of it."""
    given = (case.latents(SEED) if direction == "decode" else case.picture(SEED)).to(vae.dtype)
    call = seen.calls[f"alive in {direction}"] = Call()
    with LiveBytes([given, *vae.autoencoder.state_dict().values()]) as live:
        if direction == "decode":
            for frames in vae.decode_stream(given):
                del frames
        else:
            encode(vae, given)
    call.counted = (live.peak, 0)
    call.planned = (vae.plan(direction, case.shape).shares[vae.comm.rank].activation_bytes, 0)


def vae_with(strategy: Strategy, model: AutoencoderKLWan, *, weights: WeightSource | None = None) -> ParallelVAE:
    """The VAE of all ranks: `strategy` for the directions that it supports, `replicated` for the others."""
    able = {d: strategy if d in strategy.directions else Replicated() for d in DIRECTIONS}
    return ParallelVAE(model, encode=able["encode"], decode=able["decode"], weights=weights)


def decode(vae: ParallelVAE, z: Tensor) -> Tensor:
    """The picture [B, 3, F, H, W]."""
    (picture,) = vae.decode(z.to(vae.dtype), return_dict=False)
    assert isinstance(picture, Tensor)
    return picture


def encode(vae: ParallelVAE, x: Tensor) -> Tensor:
    """The moments [B, 2 * z_dim, T, h, w]."""
    (posterior,) = vae.encode(x.to(vae.dtype), return_dict=False)
    moments = posterior.parameters
    assert isinstance(moments, Tensor)
    return moments


class _Failed(Exception):
    """A call failed; its `Call` has the error."""


def _make(
    seen: Seen, name: str, vae: ParallelVAE, run: Callable[[], Iterable[Tensor]]
) -> tuple[Call, list[Tensor]]:
    """Make a call and record its result and messages, or its exception. Raises _Failed after an exception."""
    call = seen.calls[name] = Call()
    before = vae.ledger.snapshot()
    with _recorded_collectives() as call.collectives:
        try:
            tensors = list(run())
        # A strategy may raise any exception, which is part of the observation.
        except Exception as error:
            call.error = traceback.format_exc()
            raise _Failed from error
    counted = vae.ledger.since(before)
    call.counted = (counted.sent_bytes, counted.sent_messages)
    call.wire = {kind: (count.bytes, count.calls) for kind, count in counted.counts.items()}
    call.shapes = [tuple(tensor.shape) for tensor in tensors]
    call.digest = hashlib.sha256(b"".join(_bytes(tensor) for tensor in tensors)).hexdigest()
    return call, tensors


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _hold(call: Call, result: Tensor, expected: Tensor, expected32: Tensor | None, *, picture: bool) -> None:
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return  # `reached` stays None, and the test reports the shapes
    value_range = PICTURE_RANGE if picture else float(expected.max() - expected.min())
    found = _distance(expected, result, value_range)
    call.max_abs, call.psnr, call.equal = found.max_abs, found.psnr, found.equal
    if expected32 is None:
        call.reached = exactness_of(found)
    else:
        call.reached = exactness_of(
            found,
            float32=_distance(expected32, result, value_range),
            reference_float32=_distance(expected32, expected, value_range),
        )


def _hold_stream(call: Call, chunks: list[Tensor], expected: Tensor) -> None:
    if any(chunk.dtype != torch.uint8 or chunk.shape[1:] != expected.shape[1:] for chunk in chunks):
        return
    frames = torch.cat(chunks)
    if frames.shape == expected.shape:
        found = _distance(expected, frames, 255.0)
        call.max_abs, call.psnr, call.equal = found.max_abs, found.psnr, found.equal


def _distance(reference: Tensor, other: Tensor, value_range: float) -> Distance:
    distance = Distance(value_range)
    distance.add(reference, other)
    return distance


class _CountingWeights(ModuleWeights):
    """Records the bytes of the weights that were loaded."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._taken: dict[str, int] = {}

    def load(self, names: Iterable[str], *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        tensors = super().load(names, dtype=dtype, device=device)
        self._taken.update({name: tensor.nbytes for name, tensor in tensors.items()})
        return tensors

    def taken(self, names: set[str]) -> int:
        """Bytes of the tensors in `names` that were loaded."""
        return sum(size for name, size in self._taken.items() if name in names)


@contextmanager
def _recorded_collectives() -> Iterator[list[tuple[Any, ...]]]:
    """Records each collective that this rank calls in the block: name, tensor's shape and dtype, source rank."""
    calls: list[tuple[Any, ...]] = []
    broadcast, all_gather = Comm.broadcast, Comm.all_gather

    def recorded_broadcast(self: Comm, tensor: Tensor, source: int = 0) -> None:
        calls.append(("broadcast", tuple(tensor.shape), str(tensor.dtype), source))
        broadcast(self, tensor, source)

    def recorded_all_gather(self: Comm, tensor: Tensor) -> list[Tensor]:
        calls.append(("all_gather", tuple(tensor.shape), str(tensor.dtype)))
        return all_gather(self, tensor)

    Comm.broadcast, Comm.all_gather = recorded_broadcast, recorded_all_gather  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        Comm.broadcast, Comm.all_gather = broadcast, all_gather  # type: ignore[method-assign]
