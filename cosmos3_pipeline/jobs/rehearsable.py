"""Finds settings that a rehearsal cannot have, before it starts. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator

from cosmos3_pipeline.config.schema import Config, JobName, RehearseConfig
from cosmos3_pipeline.errors import Problem


def check_rehearse(cfg: Config) -> Iterator[Problem]:
    """Reasons why the checked `cfg` cannot be rehearsed, and rehearse settings that another job would ignore."""
    ranks, world = cfg.rehearse.ranks, cfg.topology.nodes * cfg.topology.ranks_per_node
    if cfg.job.name != JobName.rehearse:
        default = RehearseConfig()
        unread = [f"rehearse.ranks={ranks}"] if ranks is not None else []
        unread += [f"rehearse.format={cfg.rehearse.format.value}"] if cfg.rehearse.format != default.format else []
        for setting in unread:
            yield Problem(
                what=f"{setting} with job={cfg.job.name.value}",
                why="only job=rehearse reads it, so it would be ignored",
                works=f"job=rehearse, or no {setting.partition('=')[0]}",
            )
        return
    if ranks is not None and (not ranks or len(set(ranks)) < len(ranks) or not set(ranks) <= set(range(world))):
        yield Problem(
            what=f"rehearse.ranks={ranks} with {world} rank{'s' * (world > 1)}",
            why=f"each is one of the ranks 0 to {world - 1} of the topology, once",
            works="rehearse.ranks=[0], or null for all of a replica of up to eight, else one of each kind",
        )
    if "RANK" in os.environ:
        yield Problem(
            what="job=rehearse under torchrun",
            why="one process rehearses all ranks, and sends nothing",
            works="python launch.py job=rehearse ... without torchrun",
        )
