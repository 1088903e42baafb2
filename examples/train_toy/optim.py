"""Muon for matrices and convolutions, AdamW for the rest. The learning rate rises, stays, and falls at the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Coefficients of the five Newton-Schulz steps, from https://github.com/KellerJordan/modded-nanogpt.
ORTHOGONALISE = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
WARM_UP = 100  # steps until the full rate
DECAY = 0.35  # the last share of all steps, in which the rate falls to zero


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonal updates: as torch.optim.Muon, but for convolutions too.

    In trials of equal time this VAE reached 21 dB with Muon, and 17 dB with AdamW.
    Source: Keller Jordan, https://kellerjordan.github.io/posts/muon; the scale of Moonshot's arXiv:2502.16982.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                state["mean"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonal(parameter.grad.lerp(state["mean"], group["momentum"]).flatten(1))
                scale = 0.2 * max(update.shape) ** 0.5
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """Approximately the nearest matrix whose singular values are all 1."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-9)
    for a, b, c in ORTHOGONALISE:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Optimisers:
    """Both optimisers of a model, with one schedule of the rate."""

    def __init__(self, model: nn.Module, *, rate: float, small_rate: float, steps: int) -> None:
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            wide = parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) >= 8
            (matrices if wide and "embed" not in name else others).append(parameter)
        self._steps = steps
        self._all: list[tuple[torch.optim.Optimizer, float]] = [
            (Muon(matrices, lr=rate), rate),
            (torch.optim.AdamW(others, lr=small_rate, betas=(0.9, 0.98), weight_decay=0.0), small_rate),
        ]
        self._parameters = [*matrices, *others]

    def step(self, number: int, part: float = 1.0) -> None:
        """One update from the gradients, which are then dropped, at `part` times the rate of the schedule."""
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        now = part * min(1.0, (number + 1) / WARM_UP, (1 - number / self._steps) / DECAY)
        for optimiser, rate in self._all:
            for group in optimiser.param_groups:
                group["lr"] = rate * now
            optimiser.step()
            optimiser.zero_grad()

    def state_dict(self) -> list[Any]:
        return [optimiser.state_dict() for optimiser, _ in self._all]

    def load_state_dict(self, state: list[Any]) -> None:
        for (optimiser, _), own in zip(self._all, state, strict=True):
            optimiser.load_state_dict(own)
