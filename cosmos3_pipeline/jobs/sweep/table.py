"""The rows of a sweep: what its jobs have of their own, planned and measured, and how alike pictures are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from cosmos3_pipeline.jobs.measured import measured
from cosmos3_pipeline.jobs.sweep.outcome import Outcome
from cosmos3_pipeline.plan.units import quantity
from cosmos3_pipeline.stages import STAGES

SHOWN_SHARE = 0.05  # of the seconds of a run, above which a stage has a column
BROKEN_OFF = "broken off"  # what a job is that has begun, or never did, and of whose end nothing is known


def rows(
    sweep: Path, ended: Mapping[int, Outcome], planned: Mapping[int, dict[str, Any]], baseline: int
) -> list[dict[str, Any]]:
    """A row for every job that ended or was `planned`, in the order of their numbers; plain values, for JSON."""
    found = []
    for number in sorted({*ended, *planned}):
        job, plan = ended.get(number), planned.get(number, {})
        row: dict[str, Any] = {
            "job": number,
            "overrides": job.overrides if job else plan["overrides"],
            "folder": job.folder if job else None,
            "kind": job.kind if job else None,
            "status": job.status if job else BROKEN_OFF,
            "reason": job.reason if job else None,
            "problems": job.problems if job else [],
            "objective": job.objective if job else None,
            "planned": plan.get("plan"),
        }
        if job is not None and job.status == "done":
            row |= measured(Path(job.folder), job.kind)
        found.append(row)
    reference = next((row for row in found if row["job"] == baseline and "frames_sha256" in row), None)
    for row in found:
        if reference is not None and "frames_sha256" in row:
            row["likeness"] = likeness(reference, row)
    return found


def likeness(reference: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """How a job's picture relates to the reference's: `kind`, and where frames differ PSNR and SSIM of the files.

    Equal frames are told by their hash before compression, so the codec hides nothing. Frames may differ so little
    that the files are equal: then there is no PSNR, which would be infinite.
    """
    if row["job"] == reference["job"]:
        return {"kind": "reference"}
    if row["frames_sha256"] == reference["frames_sha256"]:
        return {"kind": "identical"}
    from cosmos3_pipeline.stages.media import likeness_of_files

    files = [Path(one["folder"]) / one["picture"] for one in (reference, row)]
    found = likeness_of_files(*files)
    if found is None:
        return {"kind": "other size"}
    return {"kind": "differs", "psnr_db": found.psnr_db, "ssim": found.ssim}


def varied(jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys and groups whose value is not the same in all jobs, in the order in which they are given."""
    values: dict[str, list[str | None]] = {}
    for place, job in enumerate(jobs):
        for key, value in _assignments(job["overrides"]).items():
            values.setdefault(key, [None] * len(jobs))[place] = value
    return [key for key, given in values.items() if len(set(given)) > 1]


def _assignments(overrides: Sequence[str]) -> dict[str, str]:
    """Value by key; of `~key` that it is removed."""
    pairs = (override.partition("=") for override in overrides)
    return {key.lstrip("+"): value if equals else "" for key, equals, value in pairs}


def table(jobs: Sequence[Mapping[str, Any]]) -> Table:
    """The rows for a terminal: only what varies, and only columns that some job has."""
    keys, stages = varied(jobs), [stage for stage in STAGES if any(_counts(job, stage) for job in jobs)]
    columns: list[tuple[str, Any]] = [(f"{stage} s", _seconds_of(stage)) for stage in stages]
    columns += [
        ("total s", lambda job: _number(_of_a_run(job, "total_seconds"), "{:.2f}")),
        ("planned s", lambda job: _number(_planned(job, "seconds.total"), "{:.4g}")),
        ("peak", lambda job: _bytes(_of_a_run(job, "peak_bytes"))),
        ("planned peak", lambda job: _bytes(_planned(job, "memory.peak_bytes"))),
        ("sent", lambda job: _bytes(job.get("sent_bytes"))),
        ("fits", lambda job: "" if _planned(job, "fits") in (None, True) else "[red]no[/red]"),
        ("exactness", _exactness),
        ("objective", lambda job: "" if job["objective"] is None else str(job["objective"])),
        ("picture", _picture),
    ]
    shown = [(name, cell) for name, cell in columns if any(cell(job) for job in jobs)]
    made = Table(title="sweep", title_justify="left")
    made.add_column("job", justify="right")
    for key in keys:
        made.add_column(key, overflow="fold")
    for name, _ in shown:
        made.add_column(name, justify="right")
    if any(job["status"] != "done" for job in jobs):
        made.add_column("")
    for job in jobs:
        given = _assignments(job["overrides"])
        ended = "" if job["status"] == "done" else f"[red]{job['status']}[/red]"
        made.add_row(str(job["job"]), *(given.get(key, "") for key in keys), *(c(job) for _, c in shown), ended)
    return made


def reasons(jobs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Why jobs are not done, each reason once with the jobs that have it."""
    told: dict[str, list[str]] = {}
    for job in jobs:
        if job["status"] != "done":
            told.setdefault(f"{job['status']}: {job['reason']}" if job["reason"] else job["status"], []).append(
                str(job["job"])
            )
    return (f"job {', '.join(numbers)} {reason}" for reason, numbers in told.items())


def _counts(job: Mapping[str, Any], stage: str) -> bool:
    """Whether a stage took enough of a run to be shown: the others are in sweep.json."""
    seconds = _of_a_run(job, "seconds", {}).get(stage, 0.0)
    return bool(seconds > SHOWN_SHARE * _of_a_run(job, "total_seconds", math.inf))


def _seconds_of(stage: str) -> Any:
    return lambda job: _number(_of_a_run(job, "seconds", {}).get(stage), "{:.2f}")


def _of_a_run(job: Mapping[str, Any], key: str, otherwise: Any = None) -> Any:
    """What was measured: of a plan the same keys hold what is planned, and stand in columns of their own."""
    return job.get(key, otherwise) if job["kind"] == "generate" else otherwise


def _planned(job: Mapping[str, Any], key: str) -> Any:
    return (job["planned"] or {}).get(key)


def _exactness(job: Mapping[str, Any]) -> str:
    found = [value for key, value in (job["planned"] or {}).items() if key.startswith("exactness.")]
    return next((kind for kind in ("approximate", "rounding", "bitwise") if kind in found), "")


def _picture(job: Mapping[str, Any]) -> str:
    found = job.get("likeness")
    if found is None:
        return ""
    if found["kind"] != "differs":
        return str(found["kind"])
    return "same file" if found["psnr_db"] is None else f"{found['psnr_db']:.2f} dB"


def _number(value: float | None, form: str) -> str:
    return "" if value is None or not math.isfinite(value) else form.format(value)


def _bytes(value: int | None) -> str:
    return "" if value is None else quantity("bytes", value)
