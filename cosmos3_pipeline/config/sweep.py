"""The jobs of a sweep (`-m`). Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from cosmos3_pipeline.config.compose import Composition, as_config_error
from cosmos3_pipeline.config.source import Source
from cosmos3_pipeline.errors import ConfigError


def jobs_of(overrides: Sequence[str], loader: ConfigLoader) -> list[list[str]]:
    """The overrides of each job, in the order of Hydra's sweeper. `loader` is needed to expand glob().

    Raises ConfigError for a text that is no override.
    """
    try:
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
        batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except HydraException as error:
        raise as_config_error(error, overrides) from error
    return [list(job) for batch in batches for job in batch]


def compositions_of(config: DictConfig) -> Iterator[tuple[list[str], Composition | ConfigError]]:
    """The jobs of the sweep that Hydra began with `config`: the composition of each, or why it is refused."""
    source = Source.of_a_running_job(config.hydra)
    given = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    loader = GlobalHydra.instance().config_loader()
    for job in jobs_of([*given, *config.hydra.overrides.task], loader):
        try:
            yield job, Composition(loader.load_sweep_config(config, job), job, source=source)
        except (HydraException, OmegaConfBaseException) as error:
            yield job, as_config_error(error, job, source)
