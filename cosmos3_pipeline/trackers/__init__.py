"""Hydra callbacks that send a job's numbers to a tracker. Each is in a file of its own, and off unless chosen:

    launch.py hydra/callbacks=csv
    launch.py -m 'hydra/callbacks=[csv,tensorboard]' sampler.steps=10,20

An error of a tracker is printed and does not end the run. Imports no torch.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from cosmos3_pipeline.config.plain import flat, without_hydra
from cosmos3_pipeline.config.schema import JobName
from cosmos3_pipeline.jobs.measured import measured


class Tracker(Callback):
    """Calls `track` with the config and the numbers of a finished job."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Called by Hydra, in the process that ran the job."""
        if job_return.status != JobStatus.COMPLETED:
            return
        folder = Path(config.hydra.runtime.output_dir)
        numbers = {
            name: value
            for name, value in flat(measured(folder, JobName(config.job.name).value)).items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        try:
            self.track(folder, flat(without_hydra(config)), numbers)
        except Exception as error:  # the work itself is done
            print(f"{type(self).__name__} failed: {type(error).__name__}: {error}", file=sys.stderr)

    @abstractmethod
    def track(self, folder: Path, config: dict[str, Any], numbers: dict[str, float]) -> None:
        """Record one job: its folder, its config and its numbers, both by dotted names."""
