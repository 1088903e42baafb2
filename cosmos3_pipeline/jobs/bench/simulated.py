"""The measured cases simulated from their measured costs, and more ranks than there were. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from cosmos3_pipeline.jobs.bench.suite import BUILT_IN, ONE_RANK, Case, build
from cosmos3_pipeline.plan.op_costs import MeasuredCosts
from cosmos3_pipeline.plan.simulation import Link, SimulationError, simulate
from cosmos3_pipeline.plan.vae import reference
from cosmos3_pipeline.vae.program import program_for
from cosmos3_pipeline.vae.strategy import Strategy, StrategyError

RANKS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Simulation:
    """What one rank or several take for a case, by the measured seconds of its ops and of a message."""

    case: Case
    costs: MeasuredCosts
    link: Link

    @classmethod
    def of(cls, case: Case, dimensions: Mapping[str, Any], costs: Mapping[str, Any]) -> Simulation:
        """From `costs` of bench.json."""
        measured, link = costs["cases"][case.name], Link(**costs["link"])
        samples = [(op["name"], op["rows"], op["first_s"], op["later_s"]) for op in measured["ops"]]
        if measured["message"] is not None:
            seconds, nbytes = measured["message"]["seconds"], measured["message"]["bytes"]
            link = replace(link, busy_s=max(0.0, seconds - nbytes * link.busy_s_per_byte))
        return cls(case, MeasuredCosts(program_for("decode", dimensions), samples), link)

    def seconds(self, strategy: Strategy, ranks: int) -> float:
        """Of a decode by `ranks` ranks. Raises StrategyError and SimulationError for what cannot be."""
        program = self.costs.program
        plan = strategy.plan(program, self.case.shape, ranks)
        return simulate(program, self.case.shape, plan, self.costs, self.link).seconds


def simulated(
    cases: Sequence[Case],
    plain: Mapping[str, Any],
    report: Mapping[str, Any],
    op_seconds: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any] | None:
    """For bench.json: each measured decode of ours beside its simulation, and the speed-ups of more ranks.

    `op_seconds`: by the name of the case the file by which contestants were divided that can be. None where no
    costs were measured, or no message because there was one rank.
    """
    costs = report["costs"]
    if costs is None or costs["link"] is None or not costs["cases"]:
        return None
    timed = [Simulation.of(case, report["vae"], costs) for case in cases if case.name in costs["cases"]]
    ours = dict.fromkeys(name for case in timed for name in _ours(case.case))
    runs: list[dict[str, Any]] = []
    speed_ups: list[dict[str, Any]] = []
    for one in timed:
        path = op_seconds.get(one.case.name, "")
        strategies = {name: build(name, plain, "decode", op_seconds=path) for name in ours}
        runs += _runs(one, strategies, report)
        speed_ups += _speed_ups(one, strategies)
    return {"runs": runs, "speed_ups": speed_ups}


def _ours(case: Case) -> list[str]:
    return [name for name in case.contestants if name not in BUILT_IN]


def _runs(
    one: Simulation, strategies: Mapping[str, Strategy], report: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The case's own contestants, simulated on as many ranks as they had."""
    rows = report["cases"][one.case.name]["contestants"]
    for name in (ONE_RANK, *_ours(one.case)):
        if name not in rows:
            continue
        strategy = reference() if name == ONE_RANK else strategies[name]
        ranks, measured = rows[name]["ranks"], statistics.median(rows[name]["seconds"])
        row = {"case": one.case.name, "contestant": name, "ranks": ranks, "measured_s": measured}
        try:
            seconds = one.seconds(strategy, ranks)
        except SimulationError as error:
            yield {**row, "simulated_s": None, "difference": None, "why": str(error)}
        else:
            yield {**row, "simulated_s": seconds, "difference": seconds / measured - 1, "why": ""}


def _speed_ups(one: Simulation, strategies: Mapping[str, Strategy]) -> Iterator[dict[str, Any]]:
    """Over one rank, of every strategy that was measured somewhere, by the number of ranks."""
    alone = one.seconds(reference(), 1)
    for name, strategy in strategies.items():
        found: dict[str, float | None] = {}
        for ranks in RANKS:
            try:
                found[str(ranks)] = alone / one.seconds(strategy, ranks)
            except (StrategyError, SimulationError):
                found[str(ranks)] = None  # so many ranks cannot do it, or nobody can tell how fast
        yield {"case": one.case.name, "strategy": name, "speed_up": found}
