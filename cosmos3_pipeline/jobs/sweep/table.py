"""The rows of a sweep: overrides, planned and measured numbers of each job, and how alike the pictures are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.table import Table

from cosmos3_pipeline.config.schema import JobName
from cosmos3_pipeline.jobs.measured import measured
from cosmos3_pipeline.jobs.sweep.outcome import Outcome
from cosmos3_pipeline.planning.units import quantity
from cosmos3_pipeline.stages import STAGES

RESUME, REPEATS, REPEAT = "sweep.resume", "sweep.repeats", "sweep.repeat"
SHOWN_SHARE = 0.05  # a stage has a column if it takes more than this share of a run's seconds
# The columns that a narrow terminal does without, the first to go first. The page and sweep.json have them all.
DISPENSABLE = (
    *("SSIM", "planned memory", "sent", "planned s", *(f"{stage} s" for stage in STAGES)),
    *("spread s", "exactness", "PSNR dB", "picture", "memory"),
)
KEY_WIDTH = 13  # least characters of a key's column; longer names and values are folded
BORDER = 3  # characters between two columns
BROKEN_OFF = "broken off"  # the status of a job without an outcome: it was stopped, or never started


def rows(
    ended: Mapping[int, Outcome], planned: Mapping[int, dict[str, Any]], baseline: int
) -> list[dict[str, Any]]:
    """A row for every job that ended or was `planned`, in the order of job numbers, as plain values for JSON."""
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
            "error": job.error if job else None,
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


def merged(jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for all repeats of a job: the row of the first done repeat, with medians of seconds and memory.

    `spread` has the least and the most total seconds, and `repeats` the number of done repeats. If a repeat is not
    done, the row has the status of that repeat.
    """
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for job in jobs:
        groups.setdefault(tuple(own_overrides(job["overrides"])), []).append(job)
    found = []
    for own, group in groups.items():
        done = [job for job in group if job["status"] == "done"]
        row = {**(done or group)[0], "overrides": list(own)}
        if missing := [job for job in group if job["status"] != "done"]:
            row |= {key: missing[0][key] for key in ("status", "reason", "error", "problems")}
        if len(done) > 1 and "total_seconds" in row:
            totals = [job["total_seconds"] for job in done]
            row |= {"repeats": len(done), "spread": [min(totals), max(totals)], "total_seconds": median(totals)}
            row["seconds"] = {name: median([job["seconds"][name] for job in done]) for name in row["seconds"]}
            row |= {
                key: median([job[key] for job in done]) for key in ("peak_bytes", "beyond_bytes") if key in row
            }
        found.append(row)
    return found


def own_overrides(overrides: Sequence[str]) -> list[str]:
    """The overrides that define a job, without those that repeat it or resume its sweep."""
    return [override for override in overrides if override.partition("=")[0] not in (RESUME, REPEATS, REPEAT)]


def likeness(reference: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """How alike a job's picture is to the reference: `kind`, and if frames differ, PSNR and SSIM of the files.

    Frames are compared by their hash before compression, so the codec hides no difference. Frames may differ so
    little that the files are equal. The PSNR is then None, because it would be infinite.
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
    """The keys and groups whose value is not the same in all jobs, in the order of the overrides."""
    values: dict[str, list[str | None]] = {}
    for place, job in enumerate(jobs):
        for key, value in assignments(job["overrides"]).items():
            values.setdefault(key, [None] * len(jobs))[place] = value
    return [key for key, given in values.items() if len(set(given)) > 1]


def assignments(overrides: Sequence[str]) -> dict[str, str]:
    """The value of each key. A removed key (`~key`) is listed with its `~` and an empty value."""
    pairs = (override.partition("=") for override in overrides)
    return {key.lstrip("+"): value if equals else "" for key, equals, value in pairs}


class Column(NamedTuple):
    """A column of the table: the text of a job's cell, and the value by which to sort. None is an empty cell."""

    name: str
    text: Callable[[Mapping[str, Any]], str]
    value: Callable[[Mapping[str, Any]], Any]


def columns(jobs: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns beside the overrides. A column is shown only if some job has a value in it."""
    stages = [stage for stage in STAGES if any(_counts(job, stage) for job in jobs)]
    all_done = all(job["status"] == "done" for job in jobs)
    known = [
        _column("status", lambda job: None if all_done else job["status"], str),
        *(_column(f"{stage} s", _seconds_of(stage), "{:.2f}".format) for stage in stages),
        _column("total s", _of_a_run("total_seconds"), "{:.2f}".format),
        _column("spread s", _of_a_run("spread"), lambda pair: f"{pair[0]:.2f} to {pair[1]:.2f}"),
        _column("planned s", _planned("seconds.total"), "{:.4g}".format),
        _column("memory", _of_a_run("beyond_bytes"), _bytes),
        _column("planned memory", _planned("memory.peak_bytes"), _bytes),
        _column("sent", lambda job: job.get("sent_bytes"), _bytes),
        _column("fits", lambda job: False if _planned("fits")(job) is False else None, lambda fits: "no"),
        _column("exactness", _exactness, str),
        _column("objective", lambda job: job["objective"], str),
        _column("picture", lambda job: (job.get("likeness") or {}).get("kind"), str),
        _column("PSNR dB", lambda job: (job.get("likeness") or {}).get("psnr_db"), "{:.2f}".format),
        _column("SSIM", lambda job: (job.get("likeness") or {}).get("ssim"), "{:.4f}".format),
    ]
    return [column for column in known if any(column.value(job) is not None for job in jobs)]


def _column(name: str, value: Callable[[Mapping[str, Any]], Any], text: Callable[[Any], str]) -> Column:
    return Column(name, lambda job: "" if value(job) is None else text(value(job)), value)


def table(jobs: Sequence[Mapping[str, Any]], width: int) -> tuple[Table, list[str]]:
    """The rows as a table for a terminal of `width` characters, and the columns that do not fit."""
    keys, known, given = varied(jobs), columns(jobs), [assignments(job["overrides"]) for job in jobs]
    cells = {"job": [str(job["job"]) for job in jobs]}
    cells |= {key: [one.get(key, "") for one in given] for key in keys}
    cells |= {column.name: [column.text(job) for job in jobs] for column in known}
    # Only keys and their values may be broken within a word.
    wanted = {name: max(map(len, [name, *texts])) for name, texts in cells.items()}
    least = {name: max(map(len, [*name.split(), *texts])) for name, texts in cells.items()}
    least |= {key: min(KEY_WIDTH, wanted[key]) for key in keys}
    left_out = list[str]()
    for name in DISPENSABLE:
        if name in least and sum(least.values()) + BORDER * len(least) >= width:
            left_out.append(name)
            del least[name]
    made, spare = Table(title="sweep", title_justify="left"), width - 1 - sum(least.values()) - BORDER * len(least)
    for name, narrow in least.items():
        more = max(min(wanted[name] - narrow, spare), 0)
        spare -= more
        # rich does not keep to a least width when it makes a table narrower, but it keeps to a width
        made.add_column(name, justify="left" if name in keys else "right", overflow="fold", width=narrow + more)
    for row, job in zip(zip(*(cells[name] for name in least), strict=True), jobs, strict=True):
        made.add_row(*row, style=None if job["status"] == "done" else "red")
    return made, left_out


def reasons(jobs: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Why jobs are not done: each reason once, after the numbers of its jobs, with the first of these jobs."""
    told: dict[str, list[Mapping[str, Any]]] = {}
    for job in jobs:
        if job["status"] != "done":
            reason = f"{job['status']}: {job['reason']}" if job["reason"] else job["status"]
            told.setdefault(reason, []).append(job)
    return {f"job {', '.join(str(job['job']) for job in alike)} {why}": alike[0] for why, alike in told.items()}


def _counts(job: Mapping[str, Any], stage: str) -> bool:
    """Whether a stage took enough of a run to have a column. Other stages are only in sweep.json."""
    total, seconds = _of_a_run("total_seconds")(job), _seconds_of(stage)(job)
    return total is not None and seconds is not None and bool(seconds > SHOWN_SHARE * total)


def _seconds_of(stage: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda job: (_of_a_run("seconds")(job) or {}).get(stage)


def _of_a_run(key: str) -> Callable[[Mapping[str, Any]], Any]:
    """The measured value of `key`. For job=plan the same keys have planned values, which have other columns."""
    return lambda job: job.get(key) if job["kind"] == JobName.generate.value else None


def _planned(key: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda job: (job["planned"] or {}).get(key)


def _exactness(job: Mapping[str, Any]) -> str | None:
    found = [value for key, value in (job["planned"] or {}).items() if key.startswith("exactness.")]
    return next((kind for kind in ("approximate", "rounding", "bitwise") if kind in found), None)


def _bytes(value: int) -> str:
    return quantity("bytes", value)
