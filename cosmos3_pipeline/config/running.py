"""A composition that was made before, run or shown by Hydra as if Hydra had composed it. Imports no torch.

`@hydra.main` composes for itself, twice, and makes the output directory before anybody has checked the result.
Here Hydra is given what was composed and checked, so a refused run leaves no folder and nothing is composed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from omegaconf import DictConfig

from cosmos3_pipeline.config.compose import Composition
from cosmos3_pipeline.config.provenance import beside_a_running_hydra


class _Composed(Hydra):
    """Hydra, whose composition is there already."""

    def __init__(self, composition: Composition) -> None:
        assert composition.loader is not None
        super().__init__(composition.source.job, composition.loader)
        self._cfg = composition.cfg

    def compose_config(self, *args: Any, with_log_configuration: bool = False, **kwargs: Any) -> DictConfig:
        """What was composed, whatever is asked for."""
        if with_log_configuration:
            configure_log(self._cfg.hydra.hydra_logging, self._cfg.hydra.verbose)
        return self._cfg


def run(composition: Composition, job: Callable[[DictConfig], object]) -> None:
    """Call `job` as Hydra does: with the config, in the output directory that it makes, beside its own callbacks.

    Raises what `job` raises.
    """
    with _running(composition) as composed:
        composed.run(composition.source.name, job, list(composition.overrides or ()))


def output_directory() -> Path:
    """Where the job that Hydra runs now leaves its files."""
    return Path(HydraConfig.get().runtime.output_dir)


def show(composition: Composition, what: str, package: str | None, *, resolve: bool) -> None:
    """Print it as `--cfg` does: `what` is job, hydra or all, and `package` a node of it."""
    with _running(composition) as composed:
        composed.show_cfg(composition.source.name, list(composition.overrides or ()), what, package, resolve)


@contextmanager
def _running(composition: Composition) -> Iterator[Hydra]:
    with beside_a_running_hydra():
        composed = _Composed(composition)
        GlobalHydra.instance().initialize(composed)
        yield composed
