"""`job=plan`: shows what a run of a composition will do, without running it. Imports no torch, reads no weight."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cosmos3_pipeline.config.schema import Config
from cosmos3_pipeline.jobs.start import Prepared
from cosmos3_pipeline.planning import tables
from cosmos3_pipeline.planning.fitting import that_fits
from cosmos3_pipeline.planning.plan import Plan, as_dict
from cosmos3_pipeline.planning.search import Candidate, search
from cosmos3_pipeline.planning.summary import summary, summary_lines
from cosmos3_pipeline.planning.units import quantity
from cosmos3_pipeline.stages.files import write_whole


def plan_job(prepared: Prepared, output: Path, *, multirun: bool) -> None:
    """Print the plan and leave plan.json and plan.md in `output`. With `plan.search`, search layouts instead.

    With `multirun` the plan is printed in a few lines, because a sweep ends with a table.
    """
    if prepared.config.plan.search:
        search_job(prepared.config, output)
        return
    plan = as_dict(prepared.plan)
    write_whole(output / "plan.md", tables.as_markdown(plan))
    if multirun:
        head(prepared.plan, output)
        return
    write_plan(plan, output)
    console = Console(markup=False)
    tables.show(plan, console)
    if not prepared.plan.fits:
        fits = that_fits(prepared.config, prepared.plan.accelerator.memory_bytes)
        console.print(
            f"what would fit: {fits or 'no placement, strategy or size that was tried'}", highlight=False
        )
    console.print(f"{output / 'plan.json'}", soft_wrap=True, highlight=False)


def head(plan: Plan, output: Path) -> None:
    """Print the plan in a few lines before a run starts, and leave plan.json in `output`."""
    write_plan(as_dict(plan), output)
    console = Console(markup=False)
    for line in summary_lines(plan):
        console.print(line, highlight=False, soft_wrap=True)


def write_plan(plan: dict[str, object], output: Path) -> None:
    """Write plan.json."""
    write_whole(output / "plan.json", json.dumps(plan, indent=2))


def search_job(cfg: Config, output: Path) -> None:
    """Print the layouts of the topology, best first, and leave search.json in `output`."""
    found = search(cfg)
    rows = [
        {
            "overrides": list(candidate.overrides),
            "refused": candidate.refused or None,
            "plan": None if candidate.plan is None else summary(candidate.plan),
        }
        for candidate in found
    ]
    write_whole(output / "search.json", json.dumps({"schema_version": 1, "layouts": rows}, indent=2))
    table = Table(title=f"{len(found)} layouts of the ranks and their weights, best first", title_justify="left")
    table.add_column("", justify="right")
    table.add_column("overrides", overflow="fold")
    for column in ("about", "denoise", "decode", "memory per rank", "exactness"):
        table.add_column(column, justify="right")
    for place, candidate in enumerate(found, 1):
        table.add_row(str(place), " ".join(candidate.overrides), *_search_cells(candidate))
    console = Console(markup=False)
    console.print(table)
    console.print(f"{output / 'search.json'}", soft_wrap=True, highlight=False)


def _search_cells(candidate: Candidate) -> list[str | Text]:
    plan = candidate.plan
    if plan is None:
        return ["", "", "", Text(f"refused: {candidate.refused}", style="red"), ""]
    memory = quantity("bytes", plan.peak_bytes)
    return [
        quantity("seconds", candidate.seconds),
        quantity("seconds", plan.seconds["denoise"]),
        quantity("seconds", plan.seconds["decode"]) if "decode" in plan.seconds else "",
        memory if plan.fits else Text(f"{memory}, too much", style="red"),
        ", ".join(dict.fromkeys(plan.exactness.values())),
    ]
