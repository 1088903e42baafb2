"""The outcome of a job of a sweep. The process that ran the job writes it, on any machine a launcher chose."""

from __future__ import annotations

import json
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cosmos3_pipeline.distributed.failure import RankFailed
from cosmos3_pipeline.errors import ConfigError, Problem, Refusal
from cosmos3_pipeline.stages.files import write_whole

# A folder in the folder of a sweep, with one file per job. It lists the jobs that Hydra ran in this sweep; the
# jobs' own folders may hold older files.
OUTCOMES = ".jobs"


@dataclass(frozen=True)
class Outcome:
    """The outcome of job number `job`. `status` is done, failed or refused.

    A refused job has `problems`. A refused or failed job has `error`, the text of its exception. `objective` is
    the return value of the job, `kind` its `job.name`, and `folder` the folder with its files.
    """

    job: int
    overrides: list[str]
    folder: str
    kind: str
    status: str
    problems: list[dict[str, Any]]
    error: str | None
    objective: Any = None

    @property
    def reason(self) -> str | None:
        """One line that says why the job failed or was refused."""
        if self.problems:
            return str(self.problems[0]["what"])
        lines = [line for line in (self.error or "").splitlines() if line.strip()]
        if not lines:
            return None
        rank = ""
        if len(lines) > 1 and lines[0].endswith("was stopped:"):  # this line names the rank, the next say why
            rank = f"{lines.pop(0).partition(' failed')[0]}: "
        # A traceback names its exception in the last line. Our own errors say in the first line what is wrong.
        return rank + (lines[-1] if lines[0].startswith("Traceback") else lines[0])

    def write(self, sweep: Path) -> None:
        """Write the outcome into the folder `sweep` of the sweep."""
        (sweep / OUTCOMES).mkdir(parents=True, exist_ok=True)
        write_whole(_file(sweep, self.job), json.dumps(asdict(self), indent=2, default=str))


def outcomes(sweep: Path) -> dict[int, Outcome]:
    """The outcomes of all ended jobs of the sweep in the folder `sweep`, by job number."""
    found = [Outcome(**json.loads(file.read_text(encoding="utf-8"))) for file in (sweep / OUTCOMES).glob("*.json")]
    return {outcome.job: outcome for outcome in sorted(found, key=lambda outcome: outcome.job)}


def forget(sweep: Path, job: int) -> None:
    """Remove the outcome of job number `job` that an older sweep left in the folder `sweep`."""
    _file(sweep, job).unlink()


def problems_of(error: BaseException) -> list[Problem]:
    """The problems for which a job was refused. Any other error gives none."""
    if isinstance(error, ConfigError):
        return list(error.problems)
    return [error.problem] if isinstance(error, Refusal) else []


def as_dicts(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    return [asdict(problem) for problem in problems]


def text_of(error: BaseException) -> str:
    """The text of an error for a person. Our own errors explain themselves; other errors need their traceback."""
    expected = isinstance(error, RankFailed | ValueError)
    return str(error) if expected else "".join(traceback.format_exception(error))


def _file(sweep: Path, job: int) -> Path:
    return sweep / OUTCOMES / f"{job}.json"
