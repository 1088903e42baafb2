"""How a job of a sweep ended, as the process that ran it writes it down: here, or wherever a launcher put it."""

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

# In the folder of a sweep: one file per job. They say what Hydra ran, whatever lies in the jobs' own folders.
OUTCOMES = ".jobs"


@dataclass(frozen=True)
class Outcome:
    """The end of job number `job`: `status` is done, failed or refused.

    `problems` are those of a refused job, `error` is the text of a failed one. `objective` is what it returned,
    `kind` what it was for, as `job.name` has it, and `folder` where it left its files.
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
        """Why it failed or was refused, in a line."""
        if self.problems:
            return str(self.problems[0]["what"])
        lines = [line for line in (self.error or "").splitlines() if line.strip()]
        if not lines:
            return None
        rank = ""
        if len(lines) > 1 and lines[0].endswith("was stopped:"):  # it says which rank, and what follows says why
            rank = f"{lines.pop(0).partition(' failed')[0]}: "
        # The last line of a traceback says what was raised; ours begin with what is wrong.
        return rank + (lines[-1] if lines[0].startswith("Traceback") else lines[0])

    def write(self, sweep: Path) -> None:
        """Write it down for the sweep in the folder `sweep`."""
        (sweep / OUTCOMES).mkdir(parents=True, exist_ok=True)
        write_whole(_file(sweep, self.job), json.dumps(asdict(self), indent=2, default=str))


def outcomes(sweep: Path) -> dict[int, Outcome]:
    """Every job of the sweep in the folder `sweep` that has ended, by its number."""
    found = [Outcome(**json.loads(file.read_text(encoding="utf-8"))) for file in (sweep / OUTCOMES).glob("*.json")]
    return {outcome.job: outcome for outcome in sorted(found, key=lambda outcome: outcome.job)}


def forget(sweep: Path, job: int) -> None:
    """Remove what an older sweep in the folder `sweep` has written down of job number `job`."""
    _file(sweep, job).unlink()


def problems_of(error: BaseException) -> list[Problem]:
    """The problems with which a job was refused; none for any other error."""
    if isinstance(error, ConfigError):
        return list(error.problems)
    return [error.problem] if isinstance(error, Refusal) else []


def as_dicts(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    return [asdict(problem) for problem in problems]


def text_of(error: BaseException) -> str:
    """What a person is told of it: our own errors explain themselves, of others the traceback is all there is."""
    expected = isinstance(error, RankFailed | ValueError)
    return str(error) if expected else "".join(traceback.format_exception(error))


def _file(sweep: Path, job: int) -> Path:
    return sweep / OUTCOMES / f"{job}.json"
