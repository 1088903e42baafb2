"""Whether the targets of a benchmark are met, by what it measured. Plain numbers in and out; imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cosmos3_pipeline.jobs.bench.suite import Case, Target

FEWEST_ROUNDS = 5  # that a median of rounds needs to mean something


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured: the median over the rounds with the least and the most of them.

    met: None where nothing was measured; `why` says why not.
    """

    case: str
    target: Target
    value: float | None = None
    low: float | None = None
    high: float | None = None
    met: bool | None = None
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For bench.json."""
        t = self.target
        return {
            "case": self.case,
            "target": str(t),
            **{key: getattr(t, key) for key in ("measure", "of", "over", "over_case", "at_least", "at_most")},
            **{key: getattr(self, key) for key in ("value", "low", "high", "met", "why")},
        }


def judge(cases: Sequence[Case], reports: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
    """A verdict on every target of `cases`; `reports` has what was measured, by the name of the case, so far."""
    return [_verdict(case, target, reports) for case in cases for target in case.targets]


def _verdict(case: Case, target: Target, reports: Mapping[str, Mapping[str, Any]]) -> Verdict:
    for needed in (case.name, target.over_case or case.name):
        if needed not in reports:
            return Verdict(case.name, target, why=f"{needed} has not run")
    report, other = reports[case.name], reports[target.over_case or case.name]
    if case.ranks is not None and report["ranks"] != case.ranks:
        return Verdict(case.name, target, why=f"for {case.ranks} ranks, there were {report['ranks']}")
    for where, name in ((report, target.of), (other, target.over)):
        if name in where["absent"]:
            return Verdict(case.name, target, why=f"{name}: {where['absent'][name]}")
    of = report["contestants"][target.of]
    over = other["contestants"][target.over] if target.over else None
    values = measured(target.measure, of, over)
    if values is None:
        return Verdict(case.name, target, why=f"the case does not measure {target.measure.replace('_', ' ')}")
    value = statistics.median(values)
    met = (target.at_least is None or value >= target.at_least) and (
        target.at_most is None or value <= target.at_most
    )
    return Verdict(case.name, target, value, min(values), max(values), met)


def measured(measure: str, of: Mapping[str, Any], over: Mapping[str, Any] | None) -> list[float] | None:
    """The values of `measure` for the report of a contestant: one per round for a speed, else per rank or one.

    None where it was not measured.
    """
    if measure == "speed":
        assert over is not None
        return [theirs / ours for theirs, ours in zip(over["seconds"], of["seconds"], strict=True)] or None
    if measure == "memory":
        assert over is not None
        return [max(of["peak_bytes"]) / max(over["peak_bytes"])]
    if measure == "distance":
        assert over is not None
        if of["rms_float32"] is None or over["rms_float32"] is None:
            return None
        return [of["rms_float32"] / over["rms_float32"]]
    key = {"planned_memory": "peak_bytes", "own_weights": "weight_bytes"}[measure]
    if of[f"planned_{key}"] is None:
        return None
    return [_furthest([got / said for got, said in zip(of[key], of[f"planned_{key}"], strict=True)])]


def _furthest(ratios: Sequence[float]) -> float:
    """The ratio, of those of the ranks, that is furthest from one."""
    return max(ratios, key=lambda ratio: abs(ratio - 1))
