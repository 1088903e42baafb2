"""A sweep: plans all jobs before the first starts, records the outcome of each, and prints a table at the end.

Hydra gives the results of jobs only to the sweeper, and it calls no callback at the end if a job failed. Therefore
the process of each job writes its outcome to a file (see `outcome`), on any machine that a launcher chose. The
process that started the sweep reads these files. Imports no torch.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cosmos3_pipeline.config.compose import Composition
from cosmos3_pipeline.errors import ConfigError
from cosmos3_pipeline.jobs.start import prepare
from cosmos3_pipeline.jobs.sweep import table
from cosmos3_pipeline.jobs.sweep.outcome import Outcome, as_dicts, forget, outcomes, problems_of, text_of
from cosmos3_pipeline.jobs.sweep.table import RESUME
from cosmos3_pipeline.planning.summary import summary
from cosmos3_pipeline.stages.files import write_whole

# The sweep that this process has started. None outside of a sweep, and in processes that only run a job of a
# sweep.
current: Sweep | None = None

SCHEMA_VERSION = 2
INDEX = "sweep.json"


def start(folder: Path, *, baseline: int, resume: bool = False) -> Sweep:
    """Start a sweep whose jobs have their folders in `folder`. With `resume`, jobs that are done stay done."""
    global current
    for number, outcome in outcomes(folder).items():
        if not (resume and outcome.status == "done" and Path(outcome.folder).is_dir()):
            forget(folder, number)
    current = Sweep(folder, baseline)
    return current


def done_before(folder: Path, job: int, overrides: Sequence[str]) -> Outcome | None:
    """The outcome of job number `job`, if a resumed sweep has done this job before."""
    found = outcomes(folder).get(job)
    return found if found is not None and found.overrides == _without_resume(overrides) else None


def _without_resume(overrides: Sequence[str]) -> list[str]:
    """`overrides` without `sweep.resume`, because a resumed sweep has the same jobs as before."""
    return [override for override in overrides if not override.startswith(f"{RESUME}=")]


def record(sweep: Path, job: int, overrides: Sequence[str], folder: Path, kind: str, result: Any) -> None:
    """Write the outcome of a job. `result` is the return value of the job, or the exception that it raised."""
    failed = result if isinstance(result, BaseException) else None
    problems = [] if failed is None else problems_of(failed)
    Outcome(
        job=job,
        overrides=_without_resume(overrides),
        folder=str(folder),
        kind=kind,
        status="done" if failed is None else "refused" if problems else "failed",
        problems=as_dicts(problems),
        error=None if failed is None else text_of(failed),
        objective=None if failed is not None else result,
    ).write(sweep)
    if problems and current is not None and current.planned.get(job, {}).get("problems"):
        print(f"job {job} is refused, as said before; the sweep goes on", file=sys.stderr)
    elif failed is not None:
        print(f"job {job} {'was refused' if problems else 'failed'}, the sweep goes on:", file=sys.stderr)
        print(f"{text_of(failed)}\n", file=sys.stderr)


def was_told(error: Exception) -> bool:
    """Whether `error` ended a job of this process's sweep. It was printed when the job ended."""
    told = {} if current is None else outcomes(current.folder)
    # The traceback grows on its way here, but its last line does not change.
    ends = (text_of(error), "".join(traceback.format_exception_only(error)))
    return any(outcome.error is not None and outcome.error.endswith(ends) for outcome in told.values())


def plan_ahead(overrides: list[str], composition: Composition | ConfigError) -> dict[str, Any]:
    """One job: its overrides, and the summary of its plan, or the problems for which it will be refused here."""
    try:
        if isinstance(composition, ConfigError):
            raise composition
        plan = prepare(composition, fetch=False).plan
        return {"overrides": overrides, "problems": [], "plan": summary(plan)}
    except ConfigError as error:
        return {"overrides": overrides, "problems": as_dicts(error.problems), "plan": None}


class NotStarted(BaseException):
    """A whole sweep is refused, and the reason was printed. Hydra makes a warning of an Exception in a callback.

    Therefore it is a BaseException.
    """


def not_started(why: str) -> NotStarted:
    """Print why a sweep does not start, and return the exception to raise. The table of an older sweep stays."""
    global current
    current = None
    print(f"nothing was started: {why}", file=sys.stderr)
    return NotStarted(why)


def _tell_refused(planned: Mapping[int, Mapping[str, Any]]) -> None:
    """Print which jobs will be refused, each reason once."""
    refused = {number: job["problems"] for number, job in planned.items() if job["problems"]}
    if refused:
        numbers = ", ".join(map(str, refused))
        print(f"{len(refused)} of {len(planned)} jobs will be refused: {numbers}", file=sys.stderr)
    told: dict[str, list[str]] = {}
    for number, problems in refused.items():
        for problem in problems:
            told.setdefault(f"{problem['what']}\n  works: {problem['works']}", []).append(str(number))
    for words, those in told.items():
        print(f"job {', '.join(those)}: {words}", file=sys.stderr)


class Sweep:
    """A sweep and its folder. `planned` has, by job number, the plan or the problems of each job."""

    def __init__(self, folder: Path, baseline: int) -> None:
        self.folder = folder
        self.baseline = baseline
        self.planned: dict[int, dict[str, Any]] = {}
        # A sweeper other than Hydra's own chooses jobs step by step, and decides how many of them may fail.
        self.all_must_be_done = False

    def look_ahead(self, jobs: Iterable[tuple[list[str], Composition | ConfigError]]) -> None:
        """Plan all `jobs` before the first starts, and print which will be refused and which are done already.

        Raises NotStarted if Hydra itself would stop at a job, or if a job that is done had other overrides.
        """
        self.all_must_be_done = True
        known = list(jobs)
        self.planned = {number: plan_ahead(*job) for number, job in enumerate(known)}
        _tell_refused(self.planned)
        for number, (_, composition) in enumerate(known):
            if isinstance(composition, ConfigError):
                raise not_started(f"Hydra would stop at job {number}")
        done = outcomes(self.folder)
        for number, job in done.items():
            if number >= len(known) or job.overrides != _without_resume(known[number][0]):
                raise not_started(
                    f"job {number} of {self.folder} was {' '.join(job.overrides)}, and is another one now; "
                    "a sweep is resumed with the command line that began it"
                )
        if done:
            numbers = ", ".join(map(str, done))
            print(f"{len(done)} of {len(known)} jobs are done already: {numbers}", file=sys.stderr)

    def report(self) -> bool:
        """Print the table and write it to sweep.json. Returns whether a job that must be done is not done."""
        rows = table.rows(outcomes(self.folder), self.planned, self.baseline)
        if not rows:
            return False
        content = {"schema_version": SCHEMA_VERSION, "baseline": self.baseline, "jobs": rows}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / INDEX, json.dumps(content, indent=2, allow_nan=False))
        console = Console(markup=False)
        shown = table.merged(rows)
        made, left_out = table.table(shown, console.width)
        console.print(made)
        if left_out:
            console.print(
                f"too narrow for: {', '.join(left_out)}; the page and {INDEX} have them",
                style="dim",
                highlight=False,
            )
        for reason in table.reasons(rows):
            console.print(reason, style="red", highlight=False, soft_wrap=True)
        measured = [row for row in shown if row["kind"] == "generate" and row["status"] == "done"]
        if len(measured) > 1 and not any("spread" in row for row in measured):
            console.print(
                "one run of each job: on a busy machine times differ by more than that; "
                f"{table.REPEATS}=5 takes medians",
                style="dim",
            )
        console.print(f"{self.folder / INDEX}", style="dim", soft_wrap=True)
        return self.all_must_be_done and any(row["status"] != "done" for row in rows)
