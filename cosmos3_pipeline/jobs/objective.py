"""The numbers that a job returns to its caller: those of `objective`, for a sweeper that seeks the best job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from cosmos3_pipeline.config.schema import Config, JobName
from cosmos3_pipeline.errors import Problem, Refusal, did_you_mean
from cosmos3_pipeline.jobs.measured import measured
from cosmos3_pipeline.stages import STAGES

OF_PICTURES = {"psnr": "psnr_db", "ssim": "ssim"}
OBJECTIVES = ("seconds", "peak_bytes", "sent_bytes", *OF_PICTURES, *(f"seconds.{stage}" for stage in STAGES))
EQUAL_DB = 100.0  # stands for the PSNR of equal pictures, which is infinite


def names_of(cfg: Config) -> tuple[str, ...]:
    """The objectives that the config asks for. The default is no objective."""
    asked = cfg.objective
    return () if asked is None else tuple(map(str, asked)) if isinstance(asked, list) else (str(asked),)


def check_objective(cfg: Config) -> Iterator[Problem]:
    """Objectives that do not exist, or that this job cannot have."""
    for name in names_of(cfg):
        if name not in OBJECTIVES:
            yield Problem(
                what=f"objective={name}",
                why=f"a job can return {', '.join(OBJECTIVES)}",
                works=did_you_mean(
                    name, OBJECTIVES, otherwise="one of those, or several: objective=[seconds,psnr]"
                ),
            )
        elif name in OF_PICTURES and (cfg.job.name != JobName.generate or not cfg.output.against_replicated):
            yield Problem(
                what=f"objective={name} with job={cfg.job.name.value} and output.against_replicated="
                f"{str(cfg.output.against_replicated).lower()}",
                why="a picture is as good as it is like the same latents decoded on one rank",
                works="job=generate output.against_replicated=true",
            )
    if cfg.task.prompt_file is not None and {*names_of(cfg)} & {*OF_PICTURES}:
        yield Problem(
            what=f"objective={cfg.objective} with task.prompt_file={cfg.task.prompt_file}",
            why="several clips have no likeness in common",
            works="task.prompt=... with one of them, or objective=seconds",
        )
    if names_of(cfg) and (cfg.job.name in (JobName.verify, JobName.rehearse) or cfg.plan.search):
        named = "plan.search=true" if cfg.plan.search else f"job={cfg.job.name.value}"
        yield Problem(
            what=f"objective={cfg.objective} with {named}",
            why="that job looks at several runs or ranks, so it has no seconds or bytes of its own",
            works="job=generate or job=plan, or objective=null",
        )


def objective_of(cfg: Config, output: Path) -> float | tuple[float, ...] | None:
    """The numbers that `cfg.objective` names, measured or planned by the job that left its files in `output`.

    None if it names none, and a tuple if it is a list.

    Raises:
        Refusal: the plan does not fit its device, or the named stage is not planned, so there are no seconds.
    """
    names = names_of(cfg)
    if not names:
        return None
    found = measured(output, cfg.job.name.value)
    planned = found["planned"]
    if cfg.job.name == JobName.plan and not planned["fits"]:
        raise Refusal(
            what=f"a plan of {planned['memory.peak_bytes'] / 1e9:.1f} GB a rank does not fit",
            why="an objective of what cannot run would be followed by a sweeper",
            works="fewer frames, more ranks or a device with more memory",
        )
    values = tuple(_value(name, found, output) for name in names)
    return values[0] if isinstance(cfg.objective, str) else values


def _value(name: str, found: dict[str, object], output: Path) -> float:
    if name in OF_PICTURES:
        against = json.loads((output / "metrics.json").read_text(encoding="utf-8"))["against_replicated"]
        value = against[OF_PICTURES[name]]
        return EQUAL_DB if value is None else float(value)
    of_total, _, stage = name.partition(".")
    table = {"seconds": "total_seconds" if not stage else "seconds"}.get(of_total, of_total)
    value = found[table]
    if isinstance(value, dict) and stage not in value:
        raise Refusal(
            what=f"objective={name} of a plan without {stage}",
            why=f"the stages that are planned are {', '.join(value)}",
            works=" or ".join(f"objective=seconds.{planned}" for planned in value),
        )
    return float(value[stage] if isinstance(value, dict) else value)  # type: ignore[arg-type]
