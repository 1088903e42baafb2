"""What a rehearsal cannot have, found before it starts. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator

from cosmos3_pipeline.config.schema import Config, JobName
from cosmos3_pipeline.errors import Problem


def check_rehearse(cfg: Config) -> Iterator[Problem]:
    """What keeps the checked `cfg` from being rehearsed, or `rehearse.ranks` from being read."""
    ranks, world = cfg.rehearse.ranks, cfg.topology.nodes * cfg.topology.ranks_per_node
    if cfg.job.name != JobName.rehearse:
        if ranks is not None:
            yield Problem(
                what=f"rehearse.ranks={ranks} with job={cfg.job.name.value}",
                why="only job=rehearse reads it, so it would be ignored",
                works="job=rehearse, or no rehearse.ranks",
            )
        return
    if ranks is not None and (not ranks or len(set(ranks)) < len(ranks) or not set(ranks) <= set(range(world))):
        yield Problem(
            what=f"rehearse.ranks={ranks} with {world} rank{'s' * (world > 1)}",
            why=f"each is one of the ranks 0 to {world - 1} of the topology, once",
            works="rehearse.ranks=[0], or null for one rank of each kind",
        )
    if cfg.task.prompt_file is not None:
        yield Problem(
            what=f"task.prompt_file={cfg.task.prompt_file} with job=rehearse",
            why="one clip is rehearsed, and the clips of a file are alike",
            works="task.prompt='a red kite'",
        )
    if "RANK" in os.environ:
        yield Problem(
            what="job=rehearse under torchrun",
            why="one process rehearses all ranks, and sends nothing",
            works="python launch.py job=rehearse ... without torchrun",
        )
