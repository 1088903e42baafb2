"""The plots of a page, drawn by pygal as SVG. The page decides the colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pygal
from pygal.style import Style

from cosmos3_pipeline.stages import STAGES

STYLE = Style(
    background="transparent",
    plot_background="transparent",
    foreground="var(--ink)",
    foreground_strong="var(--ink)",
    foreground_subtle="var(--faint)",
    guide_stroke_color="var(--faint)",
    major_guide_stroke_color="var(--faint)",
    opacity=".85",
    opacity_hover="1",
    colors=("var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)", "var(--c5)", "var(--c6)"),
    font_family="inherit",
    label_font_size=16,
    major_label_font_size=16,
    legend_font_size=16,
    title_font_size=18,
)
# pygal's script is left out, because it would be loaded from the network.
FIXED = {
    **{"style": STYLE, "js": [], "disable_xml_declaration": True, "explicit_size": False},
    **{"width": 760, "height": 320, "legend_at_bottom": True, "truncate_legend": -1},
}


def plots(jobs: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> list[str]:
    """Plots of seconds and memory of finished jobs, measured and planned; none for fewer than two such jobs."""
    done = [job for job in jobs if job["status"] == "done" and job.get("planned")]
    if len(done) < 2:
        return []
    labels = [names[job["job"]] for job in done]
    measured = [job for job in done if job["kind"] == "generate"]
    found = []
    if measured:
        chart = pygal.StackedBar(**FIXED, title="seconds measured, by stage", x_title="job")
        chart.x_labels = [names[job["job"]] for job in measured]
        for stage in STAGES:
            values = [job["seconds"].get(stage) for job in measured]
            if any(value and value > 0.01 * max(job["total_seconds"] for job in measured) for value in values):
                chart.add(stage, [None if value is None else round(value, 3) for value in values])
        found.append(_svg(chart, max(job["total_seconds"] for job in measured)))
    seconds = pygal.Bar(**FIXED, title="seconds, measured and planned", x_title="job")
    memory = pygal.Bar(**FIXED, title="MB of the rank that takes most, measured and planned", x_title="job")
    for chart, key, plan, scale in (
        (seconds, "total_seconds", "seconds.total", 1.0),
        (memory, "beyond_bytes", "memory.peak_bytes", 1e-6),
    ):
        chart.x_labels = labels
        if measured:
            values = [job.get(key) if job["kind"] == "generate" else None for job in done]
            chart.add("measured", [None if value is None else round(value * scale, 3) for value in values])
        expected = [round(job["planned"][plan] * scale, 3) for job in done]
        chart.add("planned", expected)
        highest = [*expected, *(value * scale for value in (values if measured else []) if value is not None)]
        found.append(_svg(chart, max(highest)))
    return found


def ticks(highest: float) -> list[float]:
    """The labels of an axis from 0 to `highest` or a little more: two to five even steps of 1, 2 or 5."""
    if highest <= 0:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(highest / 2))
    step = next(each * power for each in (1, 2, 5, 10) if highest <= 5 * each * power)
    return [round(number * step, 12) for number in range(math.ceil(highest / step) + 1)]


def _svg(chart: Any, highest: float) -> str:
    chart.y_labels = ticks(highest)
    drawn = chart.render(is_unicode=True)
    assert isinstance(drawn, str)
    return drawn
