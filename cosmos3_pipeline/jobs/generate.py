"""`job=generate`: start the ranks, or be one of them, and say at the end where the video is."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from cosmos3_pipeline.jobs import prompts, summary
from cosmos3_pipeline.jobs.ranks import on_ranks, resolved


def generate(cfg: DictConfig, output: Path, *, own_process: bool) -> None:
    """Run the composition `cfg` and leave its files in `output`.

    With one rank the run stays in this process, unless `own_process` asks for a fresh one (the jobs of a
    sweep: one's memory must not show in the next one's peak). With RANK in the environment this process is
    the root of a world that exists already.
    """
    on_ranks(cfg, output, "cosmos3_pipeline.jobs.rank:run_rank", own_process=own_process)
    if cfg.task.prompt_file is None:
        summary.show(output)
    else:
        prompts.show(output)


def join(cfg: DictConfig) -> None:
    """Be a rank other than the root in the world that RANK and WORLD_SIZE describe."""
    from cosmos3_pipeline.jobs.rank import run_rank

    run_rank(resolved(cfg), None)
