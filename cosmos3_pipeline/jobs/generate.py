"""`job=generate`: start the ranks, or be one of them, and say at the end where the video is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cosmos3_pipeline.jobs import prompts, summary
from cosmos3_pipeline.stages.files import remove_partial, write_whole


def generate(cfg: DictConfig, output: Path, *, own_process: bool) -> None:
    """Run the composition `cfg` and leave its files in `output`.

    With one rank the run stays in this process, unless `own_process` asks for a fresh one (the jobs of a
    sweep: one's memory must not show in the next one's peak). With RANK in the environment this process is
    the root of a world that exists already.
    """
    plain = resolved(cfg)
    write_whole(output / "config.yaml", OmegaConf.to_yaml(plain))
    ranks = cfg.topology.nodes * cfg.topology.ranks_per_node
    if "RANK" in os.environ or (ranks == 1 and not own_process):
        from cosmos3_pipeline.jobs.rank import run_rank

        run_rank(plain, str(output))
    else:
        from cosmos3_pipeline.distributed.launch import run_ranks
        from cosmos3_pipeline.jobs.rank import run_rank

        try:
            run_ranks(run_rank, plain, str(output), ranks=ranks)
        finally:
            for folder in (output, *output.glob("line_*")):
                remove_partial(folder)
    if cfg.task.prompt_file is None:
        summary.show(output)
    else:
        prompts.show(output)


def join(cfg: DictConfig) -> None:
    """Be a rank other than the root in the world that RANK and WORLD_SIZE describe."""
    from cosmos3_pipeline.jobs.rank import run_rank

    run_rank(resolved(cfg), None)


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """`cfg` as plain values without interpolations: what is saved, and what the ranks are sent."""
    plain = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key != "hydra"}
