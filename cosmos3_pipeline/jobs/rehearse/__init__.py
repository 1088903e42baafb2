"""`job=rehearse`: the real code at the real shapes, without a checkpoint or an accelerator. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cosmos3_pipeline.errors import ConfigError, Problem
from cosmos3_pipeline.jobs.start import Prepared
from cosmos3_pipeline.planning.tables import Sheet, markdown_of
from cosmos3_pipeline.planning.units import quantity
from cosmos3_pipeline.rehearsal.findings import Rehearsed, StageFound
from cosmos3_pipeline.stages.files import write_whole

REPORT_FILE = "rehearsal.json"
MARKDOWN_FILE = "rehearsal.md"
SCHEMA_VERSION = 1


class RehearsalFailed(SystemExit):
    """A rehearsal found something wrong. Uncaught, it ends the process with its words and exit code 1."""


def rehearse(prepared: Prepared, output: Path, *, multirun: bool) -> None:
    """Rehearse the ranks in this process; leaves rehearsal.json and rehearsal.md in `output` and prints a table.

    Raises RehearsalFailed when something is wrong, ConfigError in a sweep.
    """
    if multirun:
        problem = Problem(
            what="job=rehearse with -m",
            why="a sweep goes on after a job that found something, and nobody would see it",
            works="a run for each composition",
        )
        raise ConfigError([problem])
    from cosmos3_pipeline.jobs.rehearse.rank import rehearse_ranks

    config = prepared.config
    found = rehearse_ranks(config, config.rehearse.ranks)
    write_whole(output / REPORT_FILE, json.dumps(as_dict(found), indent=2))
    write_whole(output / MARKDOWN_FILE, as_markdown(found))
    show(found, output)
    if found.findings:
        raise RehearsalFailed("\n".join([*map(str, found.findings), f"see {output / REPORT_FILE}"]))


def as_dict(found: Rehearsed) -> dict[str, Any]:
    """For rehearsal.json: keys are added, never renamed."""
    ranks = []
    for rank in found.ranks:
        stages = {}
        for name, stage in rank.stages.items():
            planned = found.plan.ranks[rank.rank].stages[name]
            stages[name] = {
                **asdict(stage),
                "planned": {
                    "peak_bytes": planned.peak_bytes,
                    "sent_bytes": planned.sent.bytes,
                    "sent_messages": planned.sent.messages,
                },
            }
        ranks.append({**asdict(rank), "stages": stages, "stands_for": found.alike[rank.rank]})
    return {
        "schema_version": SCHEMA_VERSION,
        "model": found.plan.model,
        "task": found.plan.task,
        "text_tokens": list(found.plan.text_tokens),
        "ranks": ranks,
        "findings": [asdict(finding) for finding in found.findings],
        "notes": list(found.notes),
    }


def headline(found: Rehearsed) -> str:
    """What was rehearsed, and how it went."""
    clip, plan = found.plan.clip, found.plan
    count = len(found.findings)
    verdict = f"{count} thing{'s' * (count > 1)} wrong" if count else "as planned"
    return (
        f"rehearsed {plan.model} {plan.task}, {clip.width}x{clip.height}, {clip.num_frames} frames, {plan.steps} "
        f"steps, {len(found.ranks)} of {len(plan.ranks)} rank{'s' * (len(plan.ranks) > 1)}: {verdict}"
    )


def sheets(found: Rehearsed) -> Iterator[Sheet]:
    """The tables of a rehearsal: each stage of each rank beside its plan, who holds most, where the host waits."""
    stages, holders, waits = [], [], []
    for rank in found.ranks:
        number = f"{rank.rank}"
        for name, stage in rank.stages.items():
            stages.append((number, name, *_cells(found, rank.rank, name, stage)))
            holders += [(number, name, quantity("bytes", line.amount), line.place) for line in stage.holders]
            repeated = {line.place for line in stage.repeated}
            waits += [
                (number, name, f"{line.amount}", "yes" if line.place in repeated else "", line.place)
                for line in stage.waits
            ]
    columns = ("rank", "stage", "holds at most", "planned", "ratio", "sent", "planned", "messages", "planned")
    yield Sheet("stages, beside the plan", (*columns, "kernels", "moved"), tuple(stages))
    yield Sheet("lines that hold most", ("rank", "stage", "bytes", "line"), tuple(holders))
    yield Sheet("where the host waits", ("rank", "stage", "times", "again and again", "line"), tuple(waits))


def _cells(found: Rehearsed, rank: int, name: str, stage: StageFound) -> tuple[str, ...]:
    planned = found.plan.ranks[rank].stages[name]
    return (
        quantity("bytes", stage.peak_bytes),
        quantity("bytes", planned.peak_bytes),
        f"{stage.peak_bytes / planned.peak_bytes:.3f}",
        quantity("bytes", stage.sent_bytes),
        quantity("bytes", planned.sent.bytes),
        f"{stage.sent_messages:,}",
        f"{planned.sent.messages:,}",
        f"{stage.kernels:,}",
        quantity("bytes", stage.moved_bytes),
    )


def remarks(found: Rehearsed) -> list[str]:
    """What is wrong, and what has to be known."""
    lines = [f"wrong: {finding}" for finding in found.findings]
    lines += [
        f"rank {rank} stands for {', '.join(map(str, others[1:]))}: their plans are equal"
        for rank, others in found.alike.items()
        if len(others) > 1
    ]
    return lines + [f"note: {note}" for note in found.notes]


def as_markdown(found: Rehearsed) -> str:
    """The rehearsal as a page."""
    lines = ["# Rehearsal", "", f"{headline(found)}.", ""]
    for sheet in sheets(found):
        lines += markdown_of(sheet)
    lines += [f"- {remark}" for remark in remarks(found)]
    return "\n".join(lines) + "\n"


def show(found: Rehearsed, output: Path) -> None:
    """Print the rehearsal to the terminal."""
    console = Console()
    console.print(headline(found), style="bold red" if found.findings else "bold", highlight=False)
    for sheet in sheets(found):
        table = Table(title=sheet.title, title_justify="left")
        for column in sheet.columns:
            table.add_column(column, justify="left" if column in ("stage", "line") else "right", overflow="fold")
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)
    for remark in remarks(found):
        console.print(remark, highlight=False, soft_wrap=True)
    console.print(f"{output / REPORT_FILE} {output / MARKDOWN_FILE}", soft_wrap=True, highlight=False)
