"""A sweep: its jobs planned before any starts, each one's end written down, and a table of what Hydra ran.

Hydra gives the results of its jobs to the sweeper alone, and calls nothing at the end when a job failed. So the
process of each job writes down how it ended (see `outcome`), wherever a launcher has put it, and who started the
sweep reads that. Imports no torch.
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

# The sweep that this process has started; None outside a sweep, and in a process that runs a job of one.
current: Sweep | None = None

SCHEMA_VERSION = 2
INDEX = "sweep.json"


def start(folder: Path, *, baseline: int, resume: bool = False) -> Sweep:
    """This process starts a sweep whose jobs have their folders in `folder`; `resume`: or goes on with one."""
    global current
    for number, outcome in outcomes(folder).items():
        if not (resume and outcome.status == "done" and Path(outcome.folder).is_dir()):
            forget(folder, number)
    current = Sweep(folder, baseline)
    return current


def done_before(folder: Path, job: int, overrides: Sequence[str]) -> Outcome | None:
    """The outcome of job number `job` in a sweep that is resumed, where it is done."""
    found = outcomes(folder).get(job)
    return found if found is not None and found.overrides == _without_resume(overrides) else None


def _without_resume(overrides: Sequence[str]) -> list[str]:
    """A sweep is the same one whether or not it is resumed."""
    return [override for override in overrides if not override.startswith(f"{RESUME}=")]


def record(sweep: Path, job: int, overrides: Sequence[str], folder: Path, kind: str, result: Any) -> None:
    """Write down how a job ended: `result` is what it returned, or the exception that it raised."""
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
    """Whether `error` is how a job of this process' sweep ended, which was said when it did."""
    told = {} if current is None else outcomes(current.folder)
    # Its traceback grows on the way here; how it ends does not.
    ends = (text_of(error), "".join(traceback.format_exception_only(error)))
    return any(outcome.error is not None and outcome.error.endswith(ends) for outcome in told.values())


def plan_ahead(overrides: list[str], composition: Composition | ConfigError) -> dict[str, Any]:
    """One job: its overrides, and its plan's summary or the problems that will refuse it here."""
    try:
        if isinstance(composition, ConfigError):
            raise composition
        plan = prepare(composition, fetch=False).plan
        return {"overrides": overrides, "problems": [], "plan": summary(plan)}
    except ConfigError as error:
        return {"overrides": overrides, "problems": as_dicts(error.problems), "plan": None}


class NotStarted(BaseException):
    """A sweep is refused as a whole, which was told. Hydra makes a warning of any Exception of a callback."""


def not_started(why: str) -> NotStarted:
    """Say why a sweep does not start; what to raise then. The table of an older one stays as it is."""
    global current
    current = None
    print(f"nothing was started: {why}", file=sys.stderr)
    return NotStarted(why)


def _tell_refused(planned: Mapping[int, Mapping[str, Any]]) -> None:
    """Say which jobs will be refused, each reason once."""
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
    """The folder of a sweep. `planned` has, by number, what is known of each job before it starts."""

    def __init__(self, folder: Path, baseline: int) -> None:
        self.folder = folder
        self.baseline = baseline
        self.planned: dict[int, dict[str, Any]] = {}
        # Another sweeper than Hydra's own chooses jobs as it goes, and decides itself how many of them may fail.
        self.all_must_be_done = False

    def look_ahead(self, jobs: Iterable[tuple[list[str], Composition | ConfigError]]) -> None:
        """Plan all `jobs` before any starts, and say which of them will be refused, or are done already.

        Raises NotStarted where Hydra itself would stop at one of them, or where jobs that are done are others.
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
        """Print the table, write it to sweep.json and return whether jobs that must be done are not."""
        rows = table.rows(outcomes(self.folder), self.planned, self.baseline)
        if not rows:
            return False
        content = {"schema_version": SCHEMA_VERSION, "baseline": self.baseline, "jobs": rows}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / INDEX, json.dumps(content, indent=2, allow_nan=False))
        console = Console(markup=False)
        shown = table.merged(rows)
        console.print(table.table(shown))
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
