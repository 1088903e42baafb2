"""MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cosmos3_pipeline.trackers import Tracker


class MLflow(Tracker):
    """A run of `experiment` in the store `uri`: parameters, metrics, and the small files of the job's folder."""

    def __init__(self, uri: str, experiment: str) -> None:
        self._uri = uri
        self._experiment = experiment

    def track(self, folder: Path, config: dict[str, Any], numbers: dict[str, float]) -> None:
        import mlflow

        mlflow.set_tracking_uri(self._uri)
        mlflow.set_experiment(self._experiment)
        with mlflow.start_run(run_name=folder.name):
            mlflow.log_params({key: str(value)[:500] for key, value in config.items()})
            mlflow.log_metrics(numbers)
            for file in folder.glob("*.json"):
                mlflow.log_artifact(str(file))
