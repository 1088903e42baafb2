"""SeaCache: if the latents have hardly changed, a pass is recalled from earlier steps instead of computed.

diffusers' own gate decides in which steps this happens. It filters the noisy vision latents, compares them with
the previous step's latents, and adds up the distances over the skipped steps. diffusers' hooks cannot be used,
because a step here runs without the text and over several ranks. Instead, each rank keeps the sum of what all
layers added to its tokens. Source: diffusers `hooks/sea_cache.py`; https://huggingface.co/papers/2602.18993.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from diffusers import SeaCacheConfig
from diffusers.hooks.sea_cache import (
    SeaCacheContextState,
    SeaCacheSharedState,
    _build_indicator,
    _SeaCacheForwardMetadata,
)
from torch import Tensor

from cosmos3_pipeline.distributed.comm import Comm


class StepCache:
    """The cache of one loop. A pass is identified by its number in `guidance.Guidance`.

    Passes that run in the same steps share one gate state, because all of them see the same latents. The host
    waits for the device once per gate state.

    `comm` connects all ranks that share layers or tokens. Rank 0 of `comm` decides for all of them, because ranks
    that decided differently would wait for each other for ever. The ranks agree between hosts, once per step.
    """

    def __init__(self, settings: SeaCacheConfig, comm: Comm | None) -> None:
        self._settings = settings
        self._comm = comm
        self._gate = SeaCacheSharedState()
        # Pass number -> the first step of its present run of consecutive steps. That step -> the gate state that
        # all passes which began there share.
        self._since: dict[int, int] = {}
        self._states: dict[int, SeaCacheContextState] = {}
        # Pass number -> its last computed steps, each with what all layers added to the rank's tokens [n, hidden].
        self._added: defaultdict[int, list[tuple[int, Tensor]]] = defaultdict(list)

    def spared(
        self, numbers: Sequence[int], vision: list[Tensor], *, step: int, steps: int, sigma: float
    ) -> frozenset[int]:
        """Which of the passes `numbers` are not computed in `step` of `steps`; every rank gets the same answer.

        `vision` are the noisy latents [1, C, T, h, w], which are the same for every pass; `sigma` is their noise
        level. The host waits for the device here, because the gate reads the latents.
        """
        # A pass that was absent from a step starts with an empty cache.
        self._since = {number: self._since.get(number, step) for number in numbers}
        for number in self._added.keys() - self._since.keys():
            del self._added[number]
        if self._comm is None:
            return self._decided(vision, step, steps, sigma)
        own = self._decided(vision, step, steps, sigma) if self._comm.rank == 0 else frozenset[int]()
        return self._comm.agree(own)[0]

    def _decided(self, vision: list[Tensor], step: int, steps: int, sigma: float) -> frozenset[int]:
        seen = _SeaCacheForwardMetadata(step, sigma, steps, [latent.squeeze(0) for latent in vision])
        indicator = _build_indicator(self._settings, seen)
        self._states = {since: self._states.get(since, SeaCacheContextState()) for since in self._since.values()}
        computed = set()
        for since, state in self._states.items():
            if self._gate.resolve_gate(state, seen, indicator, self._settings):
                state.consecutive_cached = 0
                computed.add(since)
            else:
                state.consecutive_cached += 1
        return frozenset(number for number, since in self._since.items() if since not in computed)

    def keep(self, number: int, step: int, embedded: Tensor, hidden: Tensor) -> None:
        """Keep `hidden`, after the last norm, minus `embedded`; both are this rank's tokens [n, hidden]."""
        self._added[number].append((step, hidden - embedded))
        del self._added[number][: -self._settings.residual_order - 1]

    def recall(self, number: int, step: int, embedded: Tensor) -> Tensor:
        """Estimate `hidden` in `step` from the last computed steps; `embedded` [n, hidden] is the rank's input."""
        *before, (last, added) = self._added[number]
        if before:
            ((first, added_first),) = before
            added = added + (added - added_first) * ((step - last) / (last - first))
        return embedded + added
