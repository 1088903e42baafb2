"""Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cosmos3_pipeline.trackers import Tracker


class WandB(Tracker):
    """A run of `project`. With `mode` offline, the run stays in the job's folder until `wandb sync`."""

    def __init__(self, project: str, mode: str) -> None:
        self._project = project
        self._mode = mode

    def track(self, folder: Path, config: dict[str, Any], numbers: dict[str, float]) -> None:
        import wandb

        where: dict[str, Any] = {"project": self._project, "mode": self._mode, "dir": folder, "name": folder.name}
        with wandb.init(**where, config=config) as run:
            run.log(numbers)
