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

    Passes that have been in the same steps share a state: all see the same latents, so diffusers' gates would find
    the same of each, and the device is waited for once.

    The first rank of `comm`, which has all ranks that share layers or tokens, decides for all of them: ranks that
    decided differently would wait for each other for ever. The agreement goes between the hosts, once per step.
    """

    def __init__(self, settings: SeaCacheConfig, comm: Comm | None) -> None:
        self._settings = settings
        self._comm = comm
        self._gate = SeaCacheSharedState()
        # By pass: the step since which it is in every step; and by that step, what its passes share.
        self._since: dict[int, int] = {}
        self._states: dict[int, SeaCacheContextState] = {}
        # By pass: the steps in which it was computed last, and what all layers added to own tokens [n, hidden].
        self._added: defaultdict[int, list[tuple[int, Tensor]]] = defaultdict(list)

    def spared(
        self, numbers: Sequence[int], vision: list[Tensor], *, step: int, steps: int, sigma: float
    ) -> frozenset[int]:
        """Those of the passes `numbers` that are not computed in `step` of `steps`, the same on every rank.

        `vision` are the noisy latents [1, C, T, h, w], which are the same for every pass; `sigma` is their noise
        level. Waits for the device, whose latents decide.
        """
        # A pass that misses a step begins anew, so nothing of it is kept.
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
