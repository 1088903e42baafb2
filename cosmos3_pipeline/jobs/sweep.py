"""The table at the end of a sweep: every job's seconds, memory and picture beside the first one's.

Each job's failure is written down as it happens, see `cli.SweepReport`; the table is made from the files that the
jobs left, because Hydra does not call `on_multirun_end` when a job failed.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from cosmos3_pipeline.distributed.failure import RankFailed
from cosmos3_pipeline.stages import STAGES
from cosmos3_pipeline.stages.files import write_whole

FAILURE_FILE = "failure.txt"

# The sweep that this process runs, set when it starts; None outside a sweep.
current: Sweep | None = None


def start(folder: Path) -> None:
    """This process runs the sweep whose jobs have their folders in `folder`."""
    global current
    current = Sweep(folder)


def job_failed(number: int, folder: Path, error: Exception) -> None:
    """Say at once that a job of the sweep failed, and leave why in its `folder`."""
    expected = isinstance(error, RankFailed | ValueError)
    text = str(error) if expected else "".join(traceback.format_exception(error))
    (folder / FAILURE_FILE).write_text(text, encoding="utf-8")
    print(f"job {number} failed, the sweep goes on:\n{text}\n", file=sys.stderr)


class Sweep:
    """The folder of a sweep, with one subfolder per job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def report(self) -> int:
        """Print the table, write it to sweep.json and return how many jobs failed."""
        jobs = sorted((p for p in self.folder.iterdir() if (p / ".hydra").is_dir()), key=_job_order)
        rows = [_row(job) for job in jobs]
        reference = next((job for job, row in zip(jobs, rows, strict=True) if row["failed"] is None), None)
        for job, row in zip(jobs, rows, strict=True):
            if row["failed"] is None and reference is not None:
                row["identical"], row["psnr_db"] = likeness(reference, job)
        write_whole(self.folder / "sweep.json", json.dumps({"schema_version": 1, "jobs": rows}, indent=2))
        Console().print(_table(rows))
        Console().print(f"[dim]{self.folder / 'sweep.json'}[/dim]", soft_wrap=True)
        return sum(row["failed"] is not None for row in rows)


def _job_order(folder: Path) -> tuple[int, str]:
    return (int(folder.name), "") if folder.name.isdigit() else (sys.maxsize, folder.name)


def _row(job: Path) -> dict[str, Any]:
    overrides = yaml.safe_load((job / ".hydra" / "overrides.yaml").read_text()) or []
    row: dict[str, Any] = {"job": job.name, "overrides": overrides, "failed": None}
    metrics_file = job / "metrics.json"
    if not metrics_file.is_file():
        failure = job / FAILURE_FILE
        row["failed"] = failure.read_text() if failure.is_file() else "it left no metrics.json"
        return row
    metrics = json.loads(metrics_file.read_text())
    row["seconds"] = {name: stage["seconds"] for name, stage in metrics["stages"].items()}
    row["total_seconds"] = metrics["seconds"]
    row["peak_bytes"] = metrics["peak_bytes"]
    return row


def likeness(reference: Path, job: Path) -> tuple[bool, float | None]:
    """Whether a job's frames equal the reference job's, and else the PSNR in dB of the written files.

    Equal frames are told by their hash before compression, so the codec hides nothing. No PSNR is given for
    equal frames (it is infinite) and for pictures of another size.
    """
    hashes = [json.loads((j / "metrics.json").read_text())["frames_sha256"] for j in (reference, job)]
    if hashes[0] == hashes[1]:
        return True, None
    from cosmos3_pipeline.stages.media import psnr_of_files

    return False, psnr_of_files(_picture(reference), _picture(job))


def _picture(job: Path) -> Path:
    return job / str(json.loads((job / "metrics.json").read_text())["picture"])


def _table(rows: list[dict[str, Any]]) -> Table:
    shown = [s for s in STAGES if any(s in row.get("seconds", {}) for row in rows)]
    table = Table(title="sweep", title_justify="left")
    table.add_column("job", justify="right")
    table.add_column("overrides", overflow="fold")
    for name in (*shown, "total"):
        table.add_column(f"{name} s", justify="right")
    table.add_column("peak MB", justify="right")
    table.add_column("PSNR dB", justify="right")
    for row in rows:
        head = [row["job"], " ".join(row["overrides"])]
        if row["failed"] is not None:
            reason = row["failed"].strip().splitlines()
            table.add_row(*head, *[""] * (len(shown) + 2), f"[red]failed: {reason[0] if reason else '?'}[/red]")
            continue
        seconds = [f"{row['seconds'][s]:.2f}" if s in row["seconds"] else "" for s in shown]
        psnr = row["psnr_db"]
        same = "identical" if row["identical"] else "other size" if psnr is None else f"{psnr:.2f}"
        table.add_row(*head, *seconds, f"{row['total_seconds']:.2f}", f"{row['peak_bytes'] / 1e6:.0f}", same)
    return table
