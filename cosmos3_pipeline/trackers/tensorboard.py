"""TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cosmos3_pipeline.trackers import Tracker


class TensorBoard(Tracker):
    """An event file in the job's folder: scalars, and the config as text."""

    def track(self, folder: Path, config: dict[str, Any], numbers: dict[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder)) as writer:
            for name, value in numbers.items():
                writer.add_scalar(name.replace(".", "/"), value)
            writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()))
