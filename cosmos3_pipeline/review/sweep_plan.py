"""`cosmos3 sweep-plan`: the jobs that a sweep would run, each with its plan. Nothing is started."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cosmos3_pipeline.config.arguments import Arguments
from cosmos3_pipeline.config.compose import compose
from cosmos3_pipeline.config.source import BUILTIN
from cosmos3_pipeline.config.sweep import jobs_of
from cosmos3_pipeline.errors import ConfigError
from cosmos3_pipeline.planning.checks import check_composition
from cosmos3_pipeline.planning.plan import as_dict
from cosmos3_pipeline.planning.units import quantity

INVALID = 2  # exit code when a job of the sweep would be refused
USAGE = 3

DESCRIPTION = """\
The jobs of `launch.py -m OVERRIDES`, each with its plan, and which of them would be refused.

  cosmos3 sweep-plan -- model=nano topology=h200_x4,h200_x8 vae=replicated,parallel_decode

Exit code: 0 all can run, 2 at least one would be refused, 3 the sweep cannot be read.
"""


def main(arguments: Sequence[str]) -> int:
    """Run `cosmos3 sweep-plan` with `arguments` and return the exit code."""
    parser = Arguments("cosmos3 sweep-plan", DESCRIPTION, usage=USAGE)
    parser.add_argument("overrides", nargs="*", help="as for a run with -m, after --")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    asked = parser.parse([word for word in arguments if word not in ("-m", "--multirun")])
    try:
        with BUILTIN.opened() as loader:
            listed = jobs_of(asked.overrides, loader)
        jobs = [plan_job(job) for job in listed]
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USAGE
    if asked.format == "json":
        print(json.dumps({"schema_version": 1, "jobs": jobs}, indent=2))
    else:
        _show(jobs)
    return INVALID if any(job["problems"] for job in jobs) else 0


def plan_job(overrides: list[str]) -> dict[str, Any]:
    """One job: its overrides, and its plan's summary or the problems that refuse it."""
    try:
        plan = check_composition(compose(overrides)).plan()
        return {"overrides": overrides, "problems": [], "plan": as_dict(plan)["summary"]}
    except ConfigError as error:
        problems = [{"what": p.what, "why": p.why, "works": p.works} for p in error.problems]
        return {"overrides": overrides, "problems": problems, "plan": None}


def _show(jobs: Sequence[dict[str, Any]]) -> None:
    table = Table(title=f"{len(jobs)} jobs", title_justify="left")
    table.add_column("job", justify="right")
    table.add_column("overrides", overflow="fold")
    for column in ("ranks", "layout", "memory per rank", "fits", "sent", "decode", "exactness", "about"):
        table.add_column(column, justify="right")
    refused: dict[tuple[str, ...], list[str]] = {}  # each problem is printed once
    for number, job in enumerate(jobs):
        plan, head = job["plan"], (str(number), " ".join(job["overrides"]))
        if plan is None:
            table.add_row(*head, *[""] * 7, Text("refused", style="red"))
            for problem in job["problems"]:
                refused.setdefault(tuple(problem.values()), []).append(str(number))
            continue
        exactness = [value for name, value in plan.items() if name.startswith("exactness.")]
        sent = sum(value for name, value in plan.items() if name.startswith("wire.") and name.endswith("_bytes"))
        table.add_row(
            *head,
            str(plan["ranks"]),
            plan["layout"],
            quantity("bytes", plan["memory.peak_bytes"]),
            "yes" if plan["fits"] else Text("no", style="red"),
            quantity("bytes", sent),
            plan.get("strategy.decode", ""),
            next((v for v in ("approximate", "rounding") if v in exactness), "bitwise"),
            quantity("seconds", plan["seconds.total"]),
        )
    console = Console(markup=False)
    console.print(table)
    for (what, why, works), numbers in refused.items():
        jobs_named = f"job{'s' * (len(numbers) > 1)} {', '.join(numbers)}"
        console.print(f"refused {jobs_named}: {what}\n  why:   {why}\n  works: {works}", highlight=False)
