"""The timesteps of a sampler's steps, so that a plan knows which steps have guidance. Imports no torch.

Tests compare them with the timesteps of the scheduler itself, value by value. Source: diffusers
`UniPCMultistepScheduler.set_timesteps` with flow sigmas, and `Cosmos3SetTimestepsStep`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

TRAIN_TIMESTEPS = 1000
BETAS = (0.0001, 0.02)  # of the first and the last training timestep
RHO = 7.0  # of Karras et al., https://arxiv.org/abs/2206.00364
EPSILON = 1e-6  # subtracted from a first noise level of 1, at which the solver would divide by zero


def timesteps_of(schedule: Mapping[str, Any], steps: int) -> tuple[int, ...]:
    """The timestep of each of `steps`, from 999 downwards.

    `schedule` has the keys of `config.schema.ScheduleConfig`.
    """
    if schedule["use_karras_sigmas"]:
        sigmas = _karras(schedule["sigma_min"], schedule["sigma_max"], steps)
    else:
        first, last = (1 - 1 / TRAIN_TIMESTEPS, 0.0) if schedule["native_grid"] else (1.0, 1 / TRAIN_TIMESTEPS)
        shift = schedule["flow_shift"]
        even = _evenly(first, last, steps + 1)[:-1]
        sigmas = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in even]
        if abs(sigmas[0] - 1) < EPSILON:
            sigmas[0] -= EPSILON
    return tuple(int(sigma * TRAIN_TIMESTEPS) for sigma in sigmas)


def _evenly(first: float, last: float, count: int) -> list[float]:
    """`count` values from `first` to `last`, rounded as numpy's `linspace` rounds them."""
    step = (last - first) / max(count - 1, 1)
    return [number * step + first for number in range(count)]


def _rounded(value: float) -> float:
    """`value` rounded to float32, because diffusers keeps these numbers in float32."""
    found: float = struct.unpack("f", struct.pack("f", value))[0]
    return found


def _karras(sigma_min: float | None, sigma_max: float | None, steps: int) -> list[float]:
    """Flow noise levels of Karras sigmas. The seventh roots of the sigmas fall in equal steps."""
    kept, levels = 1.0, []
    for beta in _evenly(*BETAS, TRAIN_TIMESTEPS):
        kept *= _rounded(1 - _rounded(beta))
        signal = _rounded(kept)
        levels.append(_rounded(math.sqrt(_rounded((1 - signal) / signal))))
    low = (levels[0] if sigma_min is None else sigma_min) ** (1 / RHO)
    high = (levels[-1] if sigma_max is None else sigma_max) ** (1 / RHO)
    found = ((high + part * (low - high)) ** RHO for part in _evenly(0.0, 1.0, steps))
    return [sigma / (sigma + 1) for sigma in found]
