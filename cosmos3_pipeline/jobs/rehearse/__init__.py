"""`job=rehearse`: the real code at the real shapes, without a checkpoint or an accelerator. Imports no torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cosmos3_pipeline.config.schema import RehearsalFormat
from cosmos3_pipeline.errors import ConfigError, Problem
from cosmos3_pipeline.jobs.start import Prepared
from cosmos3_pipeline.planning.stage import RankStage
from cosmos3_pipeline.planning.tables import Sheet, markdown_of
from cosmos3_pipeline.planning.units import quantity
from cosmos3_pipeline.rehearsal.findings import KINDS, KernelFound, Rehearsed, StageFound
from cosmos3_pipeline.stages.files import write_whole

REPORT_FILE = "rehearsal.json"
MARKDOWN_FILE = "rehearsal.md"
# Progress lines come this often if the console is no terminal. One rank takes some seconds.
SECONDS_BETWEEN_LINES = 5.0
SCHEMA_VERSION = 1
# Columns of the tables. Each table begins with the columns PLACE.
PLACE = ("rank", "stage")
HELD_AND_SENT = ("holds at most", "planned", "ratio", "sent", "planned", "messages", "planned", "kernels", "moved")
TIMES = ("at least", "planned", "FLOPs", "planned", *KINDS, "copied from the host")
OF_KERNEL = ("kernel", "times", "moved", "FLOPs", "at least", "line")


class RehearsalFailed(SystemExit):
    """A rehearsal found something wrong. Uncaught, it ends the process with its words and exit code 1."""


def rehearse(prepared: Prepared, output: Path, *, multirun: bool) -> None:
    """Rehearse the ranks in this process. Leaves rehearsal.json and rehearsal.md in `output`, and prints them.

    Raises RehearsalFailed if the rehearsal has findings, and ConfigError in a sweep.
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
    with progress() as tell:
        found = rehearse_ranks(config, config.rehearse.ranks, tell)
    write_whole(output / REPORT_FILE, json.dumps(as_dict(found), indent=2))
    write_whole(output / MARKDOWN_FILE, as_markdown(found))
    if config.rehearse.format == RehearsalFormat.markdown:
        print(as_markdown(found), end="")
    else:
        show(found, output)
    if found.findings:
        raise RehearsalFailed("\n".join([*map(str, found.findings), f"see {output / REPORT_FILE}"]))


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Shows progress words on stderr: at once on a terminal, else at most every `SECONDS_BETWEEN_LINES`."""
    console, told = Console(stderr=True, markup=False), time.monotonic()
    with console.status("") as status:

        def tell(words: str) -> None:
            nonlocal told
            status.update(f"rehearsing {words}")
            if not console.is_terminal and time.monotonic() - told >= SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                console.print(f"rehearsing {words}", highlight=False)

        yield tell


def as_dict(found: Rehearsed) -> dict[str, Any]:
    """The content of rehearsal.json. Later versions add keys and never rename them."""
    ranks = []
    for rank in found.ranks:
        planned = found.plan.ranks[rank.rank]
        clips = [_stages_dict(stages, planned.stages) for _, stages in rank.clips]
        ranks.append(
            {
                **asdict(rank),
                "stages": clips[0],
                "second_clip": clips[1] if len(clips) > 1 else None,
                "planned_pinned_bytes": planned.host_bytes,
                "stands_for": found.alike[rank.rank],
            }
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "model": found.plan.model,
        "task": found.plan.task,
        "text_tokens": list(found.plan.text_tokens),
        "ranks": ranks,
        "findings": [asdict(finding) for finding in found.findings],
        "notes": list(found.notes),
    }


def _stages_dict(stages: dict[str, StageFound], planned: dict[str, RankStage]) -> dict[str, Any]:
    return {
        name: {
            **asdict(stage),
            "planned": {
                "peak_bytes": planned[name].peak_bytes,
                "sent_bytes": planned[name].sent.bytes,
                "sent_messages": planned[name].sent.messages,
                "flops": planned[name].flops,
                "seconds": {**planned[name].seconds, "total": planned[name].total_seconds},
            },
        }
        for name, stage in stages.items()
    }


def headline(found: Rehearsed) -> str:
    """One line that says what was rehearsed and whether it matched the plan."""
    clip, plan = found.plan.clip, found.plan
    count = len(found.findings)
    verdict = f"{count} thing{'s' * (count > 1)} wrong" if count else "as planned"
    return (
        f"rehearsed {plan.model} {plan.task}, {clip.width}x{clip.height}, {clip.num_frames} frames, {plan.steps} "
        f"steps, {len(found.ranks)} of {len(plan.ranks)} rank{'s' * (len(plan.ranks) > 1)}: {verdict}"
    )


def sheets(found: Rehearsed) -> Iterator[Sheet]:
    """The tables of a rehearsal: stages beside the plan, roofline seconds, kernels, held memory, host waits."""
    stages, times, kernels, holders, waits = [], [], [], [], []
    for rank in found.ranks:
        for clip, of_clip in rank.clips:
            for name, stage in of_clip.items():
                planned = found.plan.ranks[rank.rank].stages[name]
                first = (f"{rank.rank}{clip}", name)
                stages.append((*first, *_held_and_sent(stage, planned)))
                times.append((*first, *_times(stage, planned)))
                kernels += [(*first, *_of_kernel(kernel)) for kernel in stage.costliest]
                holders += [(*first, quantity("bytes", line.amount), line.place) for line in stage.holders]
                repeated = {line.place for line in stage.repeated}
                waits += [
                    (*first, f"{line.amount}", "yes" if line.place in repeated else "", line.place)
                    for line in stage.waits
                ]
    yield Sheet("stages, beside the plan", (*PLACE, *HELD_AND_SENT), tuple(stages))
    yield Sheet("seconds by the roofline", (*PLACE, *TIMES), tuple(times))
    yield Sheet("kernels that take most", (*PLACE, *OF_KERNEL), tuple(kernels))
    yield Sheet("lines that hold most", (*PLACE, "bytes", "line"), tuple(holders))
    yield Sheet("where the host waits", (*PLACE, "times", "again and again", "line"), tuple(waits))


def _held_and_sent(stage: StageFound, planned: RankStage) -> tuple[str, ...]:
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


def _times(stage: StageFound, planned: RankStage) -> tuple[str, ...]:
    kinds = (
        f"{quantity('seconds', kind['seconds'])}, {quantity('bytes', kind['moved_bytes'])}"
        for kind in stage.kinds.values()
    )
    return (
        quantity("seconds", stage.roofline_seconds),
        quantity("seconds", planned.total_seconds),
        quantity("flops", stage.flops),
        quantity("flops", planned.flops),
        *kinds,
        quantity("bytes", stage.copied_bytes),
    )


def _of_kernel(kernel: KernelFound) -> tuple[str, ...]:
    return (
        kernel.name,
        f"{kernel.calls:,}",
        quantity("bytes", kernel.moved_bytes),
        quantity("flops", kernel.flops),
        quantity("seconds", kernel.seconds),
        kernel.place,
    )


def remarks(found: Rehearsed) -> list[str]:
    """The findings of a rehearsal, and notes that a reader needs."""
    lines = [f"wrong: {finding}" for finding in found.findings]
    lines += [
        f"rank {rank.rank} pins {quantity('bytes', rank.pinned_bytes)} of the host's memory"
        for rank in found.ranks
        if rank.pinned_bytes
    ]
    lines += [
        f"rank {rank} stands for {', '.join(map(str, others[1:]))}: their plans are equal"
        for rank, others in found.alike.items()
        if len(others) > 1
    ]
    return lines + [f"note: {note}" for note in found.notes]


def as_markdown(found: Rehearsed) -> str:
    """The rehearsal as a Markdown page."""
    lines = ["# Rehearsal", "", f"{headline(found)}.", ""]
    for sheet in sheets(found):
        lines += markdown_of(sheet)
    lines += [f"- {remark}" for remark in remarks(found)]
    return "\n".join(lines) + "\n"


def show(found: Rehearsed, output: Path) -> None:
    """Print the rehearsal to the terminal."""
    console = Console(markup=False)
    console.print(headline(found), style="bold red" if found.findings else "bold", highlight=False)
    for sheet in sheets(found):
        table = Table(title=sheet.title, title_justify="left")
        for column in sheet.columns:
            table.add_column(
                column, justify="left" if column in ("stage", "kernel", "line") else "right", overflow="fold"
            )
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)
    for remark in remarks(found):
        console.print(remark, highlight=False, soft_wrap=True)
    console.print(f"{output / REPORT_FILE} {output / MARKDOWN_FILE}", soft_wrap=True, highlight=False)
