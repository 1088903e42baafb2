"""What `-m` makes of its overrides. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from cosmos3_pipeline.config.compose import as_config_error


def jobs_of(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job, in the order in which Hydra's sweeper runs them.

    Raises ConfigError for what is no override.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except HydraException as error:
        raise as_config_error(error, overrides) from error
    return [list(job) for batch in batches for job in batch]
