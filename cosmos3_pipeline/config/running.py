"""Let Hydra run or show a composition that was made and checked before. Imports no torch.

`@hydra.main` composes twice itself, and makes the output directory before anybody can check the result. Here Hydra
receives the checked composition. So a refused run leaves no folder, and nothing is composed again.
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
    """Hydra with a composition that was made before."""

    def __init__(self, composition: Composition) -> None:
        assert composition.loader is not None
        super().__init__(composition.source.job, composition.loader)
        self._cfg = composition.cfg

    def compose_config(self, *args: Any, with_log_configuration: bool = False, **kwargs: Any) -> DictConfig:
        """The composition, whatever the arguments ask for."""
        if with_log_configuration:
            configure_log(self._cfg.hydra.hydra_logging, self._cfg.hydra.verbose)
        return self._cfg


def run(composition: Composition, job: Callable[[DictConfig], object]) -> None:
    """Let Hydra call `job` with the config, in the output directory that Hydra makes, with Hydra's callbacks.

    Raises what `job` raises.
    """
    with _running(composition) as composed:
        composed.run(composition.source.name, job, list(composition.overrides or ()))


def output_directory() -> Path:
    """The output directory of the job that Hydra runs now."""
    return Path(HydraConfig.get().runtime.output_dir)


def show(composition: Composition, what: str, package: str | None, *, resolve: bool) -> None:
    """Print `composition` as `--cfg` does. `what` is job, hydra or all; `package` is a node of the config."""
    with _running(composition) as composed:
        composed.show_cfg(composition.source.name, list(composition.overrides or ()), what, package, resolve)


@contextmanager
def _running(composition: Composition) -> Iterator[Hydra]:
    with beside_a_running_hydra():
        composed = _Composed(composition)
        GlobalHydra.instance().initialize(composed)
        yield composed
