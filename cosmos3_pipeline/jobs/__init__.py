"""The jobs for which a composition can be run. Importing a job imports no torch; its ranks import it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cosmos3_pipeline.checkpoint.adopt import Adopted
from cosmos3_pipeline.config.schema import Config, JobName
from cosmos3_pipeline.jobs import generate, plan, rehearse, verify
from cosmos3_pipeline.jobs.objective import objective_of
from cosmos3_pipeline.jobs.start import Prepared


def run(prepared: Prepared, output: Path, *, multirun: bool) -> float | tuple[float, ...] | None:
    """Do the `prepared` job and leave its files in the directory `output`. `multirun`: it is part of a sweep.

    Returns the numbers that `objective` names, or None if it names none.

    Raises RankFailed when a rank of the run failed, VerifyFailed (exit code 1) when a strategy is not as exact as
    it declares, RehearsalFailed (exit code 1) when a rehearsal differs from its plan, and ConfigError for a job
    that cannot be part of a sweep.
    """
    config = prepared.config
    if prepared.adopted is not None:
        tell(prepared.adopted, config)
    if config.job.name == JobName.plan:
        plan.plan_job(prepared, output, multirun=multirun)
    elif config.job.name == JobName.verify:
        verify.verify(prepared, output, multirun=multirun)
    elif config.job.name == JobName.rehearse:
        rehearse.rehearse(prepared, output, multirun=multirun)
    else:
        plan.head(prepared.plan, output)
        generate.generate(prepared, output, own_process=multirun)
    return objective_of(config, output)


def tell(adopted: Adopted, cfg: Config) -> None:
    """Print where the checkpoint differs from its model option, and which of its settings are unknown here."""
    folder = adopted.checkpoint.folder
    if adopted.changed:
        print(
            f"{folder} has other numbers than model={cfg.model.name}, and they are used: {_few(adopted.changed)}"
        )
    if adopted.checkpoint.strangers:
        print(
            f"{folder} has settings that nothing here knows; they are not read: "
            f"{', '.join(adopted.checkpoint.strangers)}"
        )


def _few(changed: Sequence[str]) -> str:
    more = len(changed) - 4
    return "; ".join(changed[:4]) + (f"; and {more} more, see config.yaml" if more > 0 else "")


def follow(prepared: Prepared) -> None:
    """Take part in the `prepared` job as a rank that is not the root. This rank writes nothing.

    The root alone makes a plan or a rehearsal.
    """
    if prepared.config.job.name == JobName.verify:
        verify.join(prepared)
    elif prepared.config.job.name == JobName.generate:
        generate.join(prepared)
