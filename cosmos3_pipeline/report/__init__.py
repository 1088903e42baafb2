"""Write a page about a sweep or a run, with its pictures. It opens from disk. Imports no torch."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from cosmos3_pipeline.config.plain import flat
from cosmos3_pipeline.config.schema import JobName
from cosmos3_pipeline.jobs.measured import measured
from cosmos3_pipeline.jobs.prompts import INDEX_FILE
from cosmos3_pipeline.jobs.sweep import table
from cosmos3_pipeline.report.plots import plots
from cosmos3_pipeline.review.compare import Side, compare
from cosmos3_pipeline.review.render import as_text
from cosmos3_pipeline.review.runs import RUN
from cosmos3_pipeline.stages.files import write_whole

PAGE, TABLE = "index.html", "jobs.csv"
# The most bytes of embedded pictures in all, because a larger page would open slowly. The page links to the other
# pictures in their jobs' folders.
EMBEDDED_BYTES = 24 * 2**20
# The most pairs of jobs whose configs are compared. If there are more, only pairs with the baseline are compared.
PAIRS = 200
TYPES = {".mp4": "video/mp4", ".png": "image/png"}


def sweep_page(folder: Path) -> Path:
    """Write the page of the sweep in `folder`, which has a sweep.json, and its table as CSV. Returns the page."""
    found = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    jobs = table.merged(found["jobs"])
    return _write(folder, f"sweep {folder.name}", jobs, baseline=found["baseline"])


def run_page(folder: Path, overrides: Sequence[str]) -> Path:
    """Write the page of the run whose files are in `folder`. Returns the page."""
    runs = {folder: list(overrides)}
    if (folder / INDEX_FILE).is_file():  # a clip for each line of a prompt file
        lines = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["lines"]
        runs = {folder / line["folder"]: [f"task.prompt={line['prompt']}"] for line in lines if not line["failed"]}
    jobs = []
    for number, (place, given) in enumerate(runs.items()):
        row = {"job": number, "overrides": given, "folder": str(place), "kind": JobName.generate.value}
        row |= {
            "status": "done",
            "reason": None,
            "error": None,
            "problems": [],
            "objective": None,
            "planned": None,
        }
        jobs.append(row | measured(place, JobName.generate.value))
    return _write(folder, f"run {folder.name}", jobs, baseline=0)


def _write(folder: Path, title: str, jobs: Sequence[Mapping[str, Any]], *, baseline: int) -> Path:
    environment = Environment(
        loader=PackageLoader("cosmos3_pipeline.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    keys = table.varied(jobs)
    columns, rows = cells(jobs)
    shown = pictures(folder, jobs)
    made = environment.get_template("page.html").render(
        title=title,
        jobs=jobs,
        names={job["job"]: name_of(job, keys) for job in jobs},
        columns=columns,
        rows=rows,
        reasons=table.reasons(jobs),
        pictures=shown,
        first_pair=first_pair(jobs, [picture["job"] for picture in shown], baseline),
        plots=plots(jobs, {job["job"]: f"{job['job']}" for job in jobs}),
        diffs=diffs(jobs, baseline),
        baseline=baseline,
        csv=TABLE if len(jobs) > 1 else None,
    )
    if len(jobs) > 1:
        write_whole(folder / TABLE, as_csv(jobs))
    write_whole(folder / PAGE, made)
    return folder / PAGE


def name_of(job: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The name of a job: its number, and its values of the `keys` that vary."""
    given = table.assignments(job["overrides"])
    own = " ".join(f"{key}={given[key]}" for key in keys if key in given)
    return f"{job['job']}: {own}" if own else str(job["job"])


def cells(jobs: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[tuple[str, Any]]]]:
    """The column heads, and for each job the text and the sort key of each cell."""
    keys = table.varied(jobs)
    columns = table.columns(jobs)
    rows = []
    for job in jobs:
        given = table.assignments(job["overrides"])
        row: list[tuple[str, Any]] = [(str(job["job"]), job["job"])]
        row += [(given.get(key, ""), _sortable(given.get(key, ""))) for key in keys]
        row += [(column.text(job), column.value(job)) for column in columns]
        rows.append(row)
    return ["job", *keys, *(column.name for column in columns)], rows


def _sortable(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def as_csv(jobs: Sequence[Mapping[str, Any]]) -> str:
    """All data of every job, one column per key. A list is one cell."""
    rows = []
    for job in jobs:
        row = {key: value for key, value in _leaves(job) if not key.startswith(("planned.", "problems"))}
        rows.append({**row, **{f"planned.{key}": value for key, value in (job["planned"] or {}).items()}})
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _leaves(job: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in job.items():
        if isinstance(value, Mapping):
            found += [(f"{key}.{inner}", leaf) for inner, leaf in value.items()]
        else:
            found.append((key, " ".join(map(str, value)) if isinstance(value, list) else value))
    return found


def pictures(folder: Path, jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The videos and images of all jobs. They are embedded while there is room, else linked by path."""
    left, found = EMBEDDED_BYTES, []
    for job in jobs:
        if not job.get("picture"):
            continue
        file = Path(job["folder"]) / job["picture"]
        if not file.is_file():
            continue
        size = file.stat().st_size
        if size <= left:
            left -= size
            source = f"data:{TYPES[file.suffix]};base64,{base64.b64encode(file.read_bytes()).decode()}"
        else:
            inside = file.is_relative_to(folder.absolute())
            source = file.relative_to(folder.absolute()).as_posix() if inside else file.as_uri()
        found.append({"job": job["job"], "source": source, "video": file.suffix == ".mp4"})
    return found


def first_pair(jobs: Sequence[Mapping[str, Any]], shown: Sequence[int], baseline: int) -> tuple[int, int, bool]:
    """The two jobs whose difference is `shown` first, and whether all pictures are surely equal.

    They are the baseline and the job that differs most from it, by PSNR. Pictures that cannot be compared, such as
    those of another size, come after all others. Without a picture of the baseline they are the first two.
    """
    others = [job for job in shown if job != baseline]
    likeness = {job["job"]: job.get("likeness") or {} for job in jobs}
    if baseline not in shown or not others:
        first, second = shown[:2] if len(shown) > 1 else (baseline, baseline)
        return first, second, False
    compared = [job for job in others if likeness[job].get("psnr_db") is not None]
    farthest = min(compared, key=lambda job: likeness[job]["psnr_db"]) if compared else others[0]
    # Frames that differ without a PSNR are equal in the files, which the page shows.
    equal = not compared and all(likeness[job].get("kind") in ("identical", "differs") for job in others)
    return baseline, farthest, equal


def diffs(jobs: Sequence[Mapping[str, Any]], baseline: int) -> dict[str, str]:
    """The report on the differences between two jobs' configs, in words, for each pair such as "1-2"."""
    sides = {}
    for job in jobs:
        file = None if job["folder"] is None else Path(job["folder"]) / "config.yaml"
        if job["status"] == "done" and file is not None and file.is_file():
            sides[job["job"]] = _side(f"job {job['job']}", file, job)
    pairs = list(itertools.permutations(sides, 2))
    if len(pairs) > PAIRS:
        pairs = [pair for pair in pairs if baseline in pair]
    return {f"{a}-{b}": as_text(compare(sides[a], sides[b])) for a, b in pairs}


def _side(label: str, config: Path, job: Mapping[str, Any]) -> Side:
    saved = yaml.safe_load(config.read_text(encoding="utf-8"))
    case = {"overrides": job["overrides"], "config": flat(saved), "plan": job["planned"]}
    return Side(label, {RUN: case}, lambda wanted: [{} for _ in wanted])
