"""Chooses the fastest assignment for a clip, by the clock, among the installed strategies that are exact enough.

The clock predicts from FLOPs, memory traffic, bytes and messages. `job=verify` measures strategies on a real
machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar

from cosmos3_pipeline.plugin_api import (
    Assignment,
    Exactness,
    Found,
    LatentShape,
    Program,
    Rates,
    Strategy,
    StrategyError,
    discover,
    search,
)

__all__ = ["Auto"]

_TERA, _GIGA, _MICRO = 1e12, 1e9, 1e-6
_LEAST = 1e-6  # the least value of a rate, of memory, and of ranks


@dataclass
class Auto(Strategy):
    """`require`: the least exactness to choose from. The rest are figures of `topology`, in its units.

    CPU ranks share the memory of their node and its speed. The defaults are for one CPU core per rank and all
    ranks on one machine. A strategy that computes another picture, such as `tiled`, is never chosen, so users must
    name it. A strategy that needs more than `memory_gb` on a rank is chosen only if all strategies do.
    """

    require: str = "bitwise"
    fp32_tflops: float = 0.1
    bf16_tflops: float = 0.2
    efficiency: float = 1.0
    memory_gb: float = math.inf
    memory_gb_per_s: float = 80.0
    link_gb_per_s: float = 2.0
    network_gb_per_s: float = 1.0
    latency_us: float = 100.0
    launch_us: float = 0.0
    ranks_per_node: int = 8
    threads_per_rank: int = 1

    name: ClassVar[str] = "auto"
    exactness: ClassVar[Exactness] = (
        Exactness.ROUNDING
    )  # the least exactness that it ever chooses; a plan has the exactness of the chosen strategy

    def variants(self, ranks: int) -> Iterable[Auto]:
        """None, because it only chooses among the other strategies."""
        return []

    def assign(self, program: Program, shape: LatentShape, ranks: int) -> Assignment:
        """The fastest assignment; its note says why. Raises StrategyError for bad settings."""
        if self.require not in list(Exactness):
            raise StrategyError(
                f"auto.require={self.require}", "it is no exactness", f"use one of {', '.join(Exactness)}"
            )
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in ("latency_us", "launch_us") else _LEAST
            if field.name != "require" and not value >= least:
                raise StrategyError(
                    f"auto.{field.name}={value}",
                    "times are what is to be done divided by it" if least else "no message arrives before it left",
                    f"give at least {least}",
                )
        required = Exactness(self.require)
        rates = self._rates(shape)
        found = search(
            discover().strategies.values(),
            program,
            shape,
            ranks,
            costs=rates.costs(program, shape),
            links=rates.link,
            required=required,
        )
        if not found:
            raise StrategyError(
                f"auto.require={self.require} on a latent of {shape.rows} x {shape.cols}",
                f"no installed strategy that is {required} can {program.direction} it on {ranks} ranks",
                "install replicated, which can",
            )
        best, *rest = self._that_fit(found, program, shape, ranks)
        against = ", ".join(f"{one.seconds:.3g} s with {_called(one.strategy)}" for one in rest[:3])
        note = f"picked {_called(best.strategy)}, {best.exactness}: about {best.seconds:.3g} s"
        note += f", against {against}" * bool(rest) + f"; {best.assignment.note}" * bool(best.assignment.note)
        return replace(best.assignment, note=note)

    def _that_fit(
        self, found: Sequence[Found], program: Program, shape: LatentShape, ranks: int
    ) -> Sequence[Found]:
        """The assignments from the fastest that fits in memory on. If none fits, the smallest one."""
        peaks = []
        for number, one in enumerate(found):
            shares = one.strategy.plan(program, shape, ranks).shares
            peaks.append(max(share.held_bytes + share.activation_bytes for share in shares))
            if peaks[-1] <= _GIGA * self.memory_gb / self._sharing(shape):
                return found[number:]
        return [found[peaks.index(min(peaks))]]

    def _sharing(self, shape: LatentShape) -> int:
        """How many ranks share the memory that `memory_gb` is about."""
        return self.ranks_per_node if shape.on_host else 1

    def _rates(self, shape: LatentShape) -> Rates:
        tflops = self.bf16_tflops if shape.element_bytes == 2 else self.fp32_tflops
        return Rates(
            flops_per_s=_TERA * tflops * self.efficiency * (self.threads_per_rank if shape.on_host else 1),
            memory_bytes_per_s=_GIGA * self.memory_gb_per_s / self._sharing(shape),
            link_bytes_per_s=_GIGA * self.link_gb_per_s,
            network_bytes_per_s=_GIGA * self.network_gb_per_s,
            latency_s=_MICRO * self.latency_us,
            launch_s=_MICRO * self.launch_us,
            ranks_per_node=self.ranks_per_node,
        )


def _called(strategy: Strategy) -> str:
    """The name of a strategy, with its settings that differ from the defaults."""
    usual = vars(type(strategy)())
    changed = ", ".join(f"{name}={value}" for name, value in vars(strategy).items() if value != usual[name])
    return f"{strategy.name} ({changed})" if changed else strategy.name
