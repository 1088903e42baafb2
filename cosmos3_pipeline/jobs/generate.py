"""`job=generate`: start the ranks, or be one of them, and print at the end where the video is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from cosmos3_pipeline.jobs import prompts, summary
from cosmos3_pipeline.jobs.ranks import on_ranks
from cosmos3_pipeline.jobs.start import Prepared

if TYPE_CHECKING:
    from cosmos3_pipeline.stages.build import StageFactory


def generate(
    prepared: Prepared,
    output: Path,
    *,
    own_process: bool = False,
    stages: Mapping[str, StageFactory] = MappingProxyType({}),
) -> None:
    """Run the `prepared` job and leave its files in `output`. `stages` are replacements, see `build_stages`.

    With one rank the run stays in this process, unless `own_process` asks for a fresh process. The jobs of a sweep
    need fresh processes, because the memory of one job must not show in the next job's peak. With RANK in the
    environment this process is the root of a world that exists already.
    """
    config, entry = prepared.config, "cosmos3_pipeline.jobs.rank:run_rank"
    on_ranks(config, output, entry, prepared.plan, dict(stages), prepared.origin, own_process=own_process)
    if config.task.prompt_file is None:
        summary.show(output)
    else:
        prompts.show(output)


def join(prepared: Prepared) -> None:
    """Be a rank other than the root in the world that RANK and WORLD_SIZE describe."""
    from cosmos3_pipeline.jobs.rank import run_rank

    run_rank(prepared.config, prepared.plan, {}, prepared.origin, None)
