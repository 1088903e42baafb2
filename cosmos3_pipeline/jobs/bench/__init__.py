"""`job=bench`: the parallel VAE against diffusers, DistVAE and the machine's convolutions. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from cosmos3_pipeline.config.schema import Config
from cosmos3_pipeline.errors import ConfigError, Problem
from cosmos3_pipeline.jobs.bench import checks, tables
from cosmos3_pipeline.jobs.bench.suite import vae_dimensions
from cosmos3_pipeline.jobs.ranks import on_ranks

REPORT_FILE = "bench.json"
MARKDOWN_FILE = "bench.md"
OP_SECONDS_FILE = "op_seconds_{case}.json"


def check_bench(cfg: Config) -> None:
    """Raise ConfigError with everything that keeps `bench` of a checked `cfg` from being done, or being read."""
    found = list(checks.problems(cfg))
    if found:
        raise ConfigError(found)


def bench(cfg: Config, output: Path, *, multirun: bool) -> None:
    """Run the cases that `cfg` chooses; leaves bench.json, bench.md and plots in `output` and prints the tables.

    A target that is missed is reported and fails nothing. Raises RankFailed when a rank failed.
    """
    if multirun:
        problem = Problem(
            what="job=bench with -m",
            why="a sweep compares the pictures that its jobs leave, and bench leaves none",
            works="one run with several cases: bench.cases=[decode,spatial_shard]",
        )
        raise ConfigError([problem])
    on_ranks(cfg, output, "cosmos3_pipeline.jobs.bench.rank:bench_rank", vae_dimensions(cfg))
    show(output)


def join(cfg: Config) -> None:
    """Be a rank other than the root in the world that RANK and WORLD_SIZE describe."""
    from cosmos3_pipeline.jobs.bench.rank import bench_rank

    bench_rank(cfg, vae_dimensions(cfg), None)


def show(output: Path) -> None:
    """Print the tables of the report in `output`."""
    console = Console()
    for table in tables.tables(json.loads((output / REPORT_FILE).read_text())):
        console.print(table.rich())
    files = [REPORT_FILE, MARKDOWN_FILE, *sorted(path.name for path in output.glob("bench*.png"))]
    console.print(" ".join(str(output / name) for name in files), soft_wrap=True, highlight=False)
