"""SeaCache: a pass whose latents have hardly changed is not computed, but recalled from the steps before.

Which steps these are, diffusers decides: its own gate is asked. It filters the noisy vision latents, compares them
with those of the step before, and adds up the distances of the steps that were spared. Here is what its hooks
cannot do, because a step here runs without the text and over ranks: each rank keeps the sum of all layers of its
own tokens. Source: diffusers `hooks/sea_cache.py`; https://huggingface.co/papers/2602.18993.
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
    """The cache of one loop. Passes are known by their numbers, see `guidance.Guidance`.

    The first rank of `comm`, which has all ranks that share layers or tokens, decides for all of them: ranks that
    decided differently would wait for each other for ever. The agreement goes between the hosts, once per step.
    """

    def __init__(self, settings: SeaCacheConfig, comm: Comm | None) -> None:
        self._settings = settings
        self._comm = comm
        self._gate = SeaCacheSharedState()
        self._states: defaultdict[int, SeaCacheContextState] = defaultdict(SeaCacheContextState)
        # By pass: the steps in which it was computed last, and what all layers added to own tokens [n, hidden].
        self._added: defaultdict[int, list[tuple[int, Tensor]]] = defaultdict(list)

    def spared(
        self, numbers: Sequence[int], vision: list[Tensor], *, step: int, steps: int, sigma: float
    ) -> frozenset[int]:
        """Those of the passes `numbers` that are not computed in `step` of `steps`, the same on every rank.

        `vision` are the noisy latents [1, C, T, h, w], which are the same for every pass; `sigma` is their noise
        level. Waits for the device, whose latents decide.
        """
        for number in (self._states.keys() | self._added.keys()).difference(numbers):
            # A pass that misses a step begins anew, so nothing of it is kept.
            self._states.pop(number, None)
            self._added.pop(number, None)
        if self._comm is None:
            return self._decided(numbers, vision, step, steps, sigma)
        own = self._decided(numbers, vision, step, steps, sigma) if self._comm.rank == 0 else frozenset[int]()
        return self._comm.agree(own)[0]

    def _decided(
        self, numbers: Sequence[int], vision: list[Tensor], step: int, steps: int, sigma: float
    ) -> frozenset[int]:
        seen = _SeaCacheForwardMetadata(step, sigma, steps, [latent.squeeze(0) for latent in vision])
        indicator = _build_indicator(self._settings, seen)
        spared = set()
        for number in numbers:
            state = self._states[number]
            if self._gate.resolve_gate(state, seen, indicator, self._settings):
                state.consecutive_cached = 0
            else:
                state.consecutive_cached += 1
                spared.add(number)
        return frozenset(spared)

    def keep(self, number: int, step: int, embedded: Tensor, hidden: Tensor) -> None:
        """Keep what the layers and the last norm have made of own tokens `embedded` [n, hidden] in `step`."""
        self._added[number].append((step, hidden - embedded))
        del self._added[number][: -self._settings.residual_order - 1]

    def recall(self, number: int, step: int, embedded: Tensor) -> Tensor:
        """What the layers would make of own tokens `embedded` in `step`, from the steps in which they did."""
        *before, (last, added) = self._added[number]
        if before:
            ((first, added_first),) = before
            added = added + (added - added_first) * ((step - last) / (last - first))
        return embedded + added
