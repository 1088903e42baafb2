"""Trackers as Hydra callbacks: CSV here; TensorBoard, MLflow and Weights & Biases where they are installed."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml
from conftest import SMALL, launch, metrics

from cosmos3_pipeline.config import config_dir

pytestmark = pytest.mark.ranks
ONE = (*SMALL, "topology.threads_per_rank=1")


@pytest.mark.thorough
def test_csv_has_a_row_per_job_and_a_run_that_fails_none(tmp_path: Path) -> None:
    file = tmp_path / "below" / "jobs.csv"
    asked = ("hydra/callbacks=csv", f"hydra.callbacks.csv.file={file}")
    assert launch(*ONE, *asked, f"hydra.run.dir={tmp_path / 'run'}").returncode == 0
    steps = (*(o for o in ONE if not o.startswith("sampler.steps")), "sampler.steps=1,2")
    assert launch("-m", *steps, *asked, f"hydra.sweep.dir={tmp_path / 'sweep'}").returncode == 0
    assert launch(*ONE, *asked, "task.num_frames=8").returncode == 2
    rows = list(csv.DictReader(file.open()))
    assert [row["sampler.steps"] for row in rows] == ["2", "1", "2"]
    assert float(rows[0]["total_seconds"]) == metrics(tmp_path / "run")["seconds"]
    assert rows[0]["folder"] == str(tmp_path / "run")


@pytest.mark.thorough
def test_a_tracker_that_fails_costs_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    asked = ("hydra/callbacks=csv", f"hydra.callbacks.csv.file={tmp_path / 'file' / 'jobs.csv'}")
    done = launch(*ONE, *asked, f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 0 and "Csv failed" in done.stderr
    assert (tmp_path / "run" / "video.mp4").is_file()


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="make interop installs it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert launch(*ONE, "hydra/callbacks=tensorboard", f"hydra.run.dir={tmp_path}").returncode == 0
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Scalars("total_seconds")[0].value == pytest.approx(metrics(tmp_path)["seconds"])


def test_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="make interop installs it")
    done = launch(*ONE, "hydra/callbacks=wandb", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0 and "WandB failed" not in done.stderr, done.stderr
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 1


def test_mlflow_in_a_local_store(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="make interop installs it")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    done = launch(*ONE, "hydra/callbacks=mlflow", f"hydra.callbacks.mlflow.uri={uri}", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0 and "MLflow failed" not in done.stderr, done.stderr
    (run,) = mlflow.tracking.MlflowClient(uri).search_runs(["1"])
    assert run.data.metrics["total_seconds"] == metrics(tmp_path)["seconds"]
    assert run.data.params["sampler.steps"] == "2"


def test_each_is_an_option_that_says_what_it_needs() -> None:
    for name in ("csv", "tensorboard", "mlflow", "wandb"):
        text = (config_dir() / "hydra" / "callbacks" / f"{name}.yaml").read_text()
        (node,) = yaml.safe_load(text).values()
        assert node["_target_"].startswith("cosmos3_pipeline.trackers.")
        assert name == "csv" or f"cosmos3-pipeline[{name}]" in text


@pytest.mark.thorough
def test_the_log_says_what_the_terminal_said(tmp_path: Path) -> None:
    done = launch(*ONE, f"hydra.run.dir={tmp_path}")
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0 and done.stdout in log.replace(done.stderr, "") and "denoising steps" in log
    assert json.loads((tmp_path / "metrics.json").read_text())["picture"] in log
    ranks = tmp_path / "ranks"
    assert launch(*ONE, "topology=cpu_x2", f"hydra.run.dir={ranks}").returncode == 0
    assert (ranks / "log.txt").read_text().count("denoising steps") == 1
