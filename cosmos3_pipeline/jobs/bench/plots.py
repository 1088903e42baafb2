"""bench.png: of every timed case the seconds of its contestants as ratios, with their spread and the targets."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cosmos3_pipeline.jobs.bench.suite import DIFFUSERS, ROOFLINE
from cosmos3_pipeline.jobs.bench.tables import times
from cosmos3_pipeline.stages.files import whole_file

PICTURE_FILE = "bench.png"
TARGETS_FILE = "bench_targets.png"
OURS, THEIRS, TARGET = "#2a6f97", "#b0b0b0", "#c1121f"
PEERS = (DIFFUSERS, "diffusers_tiled", "distvae")


def draw(report: Mapping[str, Any], folder: Path) -> None:
    """Write the plots of `report`, as far as there is something to draw, and matplotlib to draw it with."""
    if find_spec("matplotlib") is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    timed = {
        name: case
        for name, case in report["cases"].items()
        if case["contestants"].get(DIFFUSERS, {}).get("seconds")
    }
    if timed:
        _speeds(timed, report, folder / PICTURE_FILE)
    judged = [v for v in report["targets"] if v["met"] is not None]
    if judged:
        _targets(judged, report, folder / TARGETS_FILE)


def _heading(report: Mapping[str, Any]) -> str:
    m = report["machine"]
    return f"{report['width']} width, {report['ranks']} ranks, {m['processor']}, torch {m['versions']['torch']}"


def _speeds(cases: Mapping[str, Any], report: Mapping[str, Any], path: Path) -> None:
    """One panel per case: how many times faster than diffusers each contestant is."""
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(9, 0.6 + sum(0.75 + 0.32 * len(_shown(c)) for c in cases.values())), layout="constrained"
    )
    panels = figure.subplots(
        len(cases), 1, squeeze=False, gridspec_kw={"height_ratios": [1 + len(_shown(c)) for c in cases.values()]}
    )
    for panel, case in zip(panels[:, 0], cases.values(), strict=True):
        shown = _shown(case)
        theirs = case["contestants"][DIFFUSERS]["seconds"]
        for place, (name, row) in enumerate(reversed(shown.items())):
            ratios = [a / b for a, b in zip(theirs, row["seconds"], strict=True)]
            middle = statistics.median(ratios)
            error = [[middle - min(ratios)], [max(ratios) - middle]]
            colour = THEIRS if name in (*PEERS, ROOFLINE) else OURS
            panel.barh(place, middle, color=colour, xerr=error, ecolor="black", capsize=3, height=0.7)
            panel.text(max(ratios), place, f"  {middle:.2f}x", va="center", fontsize=8)
        panel.set_yticks(range(len(shown)), [_label(n, r) for n, r in reversed(shown.items())], fontsize=8)
        panel.set_xlim(right=panel.get_xlim()[1] * 1.08)
        panel.set_title(case["title"], fontsize=9, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("times as fast as diffusers on one rank: median, least to most of the rounds")
    figure.suptitle(_heading(report), fontsize=10)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _shown(case: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row for name, row in case["contestants"].items() if row["seconds"]}


def _label(name: str, row: Mapping[str, Any]) -> str:
    return f"{name}, {row['ranks']} ranks" if row["ranks"] > 1 else name


def _targets(verdicts: list[Mapping[str, Any]], report: Mapping[str, Any], path: Path) -> None:
    """Every measured target as a share of what is asked; right of the line is better."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(9, 1 + 0.34 * len(verdicts)), layout="constrained")
    panel = figure.subplots()
    for place, v in enumerate(reversed(verdicts)):
        least, middle, most = sorted(_reached(v, v[key]) for key in ("low", "value", "high"))
        colour = OURS if v["met"] else TARGET
        panel.errorbar(middle, place, xerr=[[middle - least], [most - middle]], fmt="o", color=colour, capsize=3)
        panel.text(1.01, place, times(v["value"]), transform=panel.get_yaxis_transform(), va="center", fontsize=8)
    panel.axvline(1, color=TARGET, linewidth=1)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.set_yticks(range(len(verdicts)), [f"{v['case']}: {v['target']}" for v in reversed(verdicts)], fontsize=8)
    panel.set_xlabel("how far the target is reached: right of the line it is met")
    panel.set_title(_heading(report), fontsize=10, loc="left")
    panel.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _reached(v: Mapping[str, Any], value: float) -> float:
    """1 where the target is just met, more where it is met with room."""
    bounds = []
    if v["at_least"] is not None:
        bounds.append(value / v["at_least"])
    if v["at_most"] is not None:
        bounds.append(v["at_most"] / value if value else float("inf"))
    return float(min(bounds))
