"""Observes on one rank that a rank raises, a reader closes the stream, or the plan refuses. Runs in a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos3_pipeline.errors import Problem
from cosmos3_pipeline.jobs.verify.distance import Distance, exactness_of
from cosmos3_pipeline.plugin_kit.cases import Case
from cosmos3_pipeline.plugin_kit.observe import decode, encode, vae_with
from cosmos3_pipeline.plugin_kit.subject import Subject
from cosmos3_pipeline.vae.bound_ops import BoundOp, Flow
from cosmos3_pipeline.vae.parallel_vae import ParallelVAE
from cosmos3_pipeline.vae.program import Direction
from cosmos3_pipeline.vae.weights import WeightSource
from cosmos3_plugins.replicated import Replicated

SEED = 7


class InjectedFault(Exception):
    """Raised inside the strategy's own work on one rank."""


@dataclass(frozen=True)
class Outcome:
    """The end of a call: the name of the exception ("" for none), its message, and its `Problem` if it has one.

    injected: whether this rank reached the fault.
    recovered: whether the next call was right; None if there was no next call.
    """

    error: str
    message: str
    problem: Problem | None = None
    injected: bool = False
    recovered: bool | None = None


def outcome_of(call: Callable[[], object]) -> Outcome:
    """The outcome of `call`."""
    # Any exception is part of the outcome.
    try:
        call()
    except Exception as error:
        return Outcome(type(error).__name__, str(error), getattr(error, "problem", None))
    return Outcome("", "")


def break_one_rank(subject: Subject, case: Case, direction: Direction, broken: int) -> Outcome:
    """Rank `broken` raises at its first op on a later chunk (or on the only chunk); then all ranks call again."""
    vae, reference = _vaes(subject, case)
    injected = False

    def breaking(run: Callable[[Any, Flow], None]) -> Callable[[Any, Flow], None]:
        def broken_run(op: Any, flow: Flow) -> None:
            nonlocal injected
            if not flow.first or case.chunks() == 1:
                injected = True
                raise InjectedFault("the kit broke this rank")
            run(op, flow)

        return broken_run

    given = case.latents(SEED) if direction == "decode" else case.picture(SEED)
    with ExitStack() as broken_ops:
        if dist.get_rank() == broken:
            for op in BoundOp.__subclasses__():
                broken_ops.enter_context(patch.object(op, "run", breaking(op.run)))
        outcome = outcome_of(lambda: _call(vae, direction, given))
    return replace(outcome, injected=injected, recovered=_right(subject, vae, reference, direction, given))


def leave_early(subject: Subject, case: Case) -> tuple[int, Outcome]:
    """The root closes the stream after its first chunk; the others must end too. (Chunks seen, outcome.)"""
    vae, reference = _vaes(subject, case)
    z = case.latents(SEED)
    seen = 0

    def read() -> None:
        nonlocal seen
        stream = vae.decode_stream(z)
        for _ in stream:
            seen += 1
            break
        stream.close()  # type: ignore[attr-defined]

    outcome = outcome_of(read)
    return seen, replace(outcome, recovered=_right(subject, vae, reference, "decode", z))


def refuse(subject: Subject, case: Case, direction: Direction) -> Outcome:
    """A call that the strategy's plan refuses, on a VAE whose weights cannot be read."""
    vae = vae_with(subject.build(), case.autoencoder(), weights=_Unreadable())
    given = case.latents(SEED) if direction == "decode" else case.picture(SEED)
    return outcome_of(lambda: _call(vae, direction, given))


class _Unreadable(WeightSource):
    def load(self, names: Iterable[str], *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        raise AssertionError("weights were read for a call that the plan refuses")


def _vaes(subject: Subject, case: Case) -> tuple[ParallelVAE, ParallelVAE]:
    """The VAE with the strategy under test, and the reference."""
    model = case.autoencoder()
    return vae_with(subject.build(), model), vae_with(Replicated(), model)


def _right(
    subject: Subject, vae: ParallelVAE, reference: ParallelVAE, direction: Direction, given: Tensor
) -> bool:
    """Whether a call's result is as exact as the strategy declares."""
    expected = _call(reference, direction, given)
    found = Distance(float(expected.max() - expected.min()))
    found.add(expected, _call(vae, direction, given))
    reached = exactness_of(found)
    return reached is not None and reached.satisfies(subject.build().exactness)


def _call(vae: ParallelVAE, direction: Direction, given: Tensor) -> Tensor:
    return decode(vae, given) if direction == "decode" else encode(vae, given)
