"""Sweeps as a user starts them: by Hydra's own launcher and sweeper, and by those that people install."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, SMALL, launch, wait_for_ranks
from limits import HANGS

from cosmos3_pipeline.jobs.sweep import table


def jobs_of(sweep: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((sweep / "sweep.json").read_text())["jobs"]
    return rows


def test_a_sweep_tells_every_job(tmp_path: Path) -> None:
    choices = ("vae=replicated,parallel_decode", "topology=cpu_x1,cpu_x2")
    done = launch("-m", *SMALL, *choices, "sweep.baseline=3", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert [row["likeness"]["kind"] for row in jobs_of(tmp_path)].count("reference") == 1
    # One thread instead of two may round otherwise; with as many the pictures are equal.
    assert jobs_of(tmp_path)[1]["likeness"] == {"kind": "identical"}
    assert all((tmp_path / str(i) / "video.mp4").is_file() for i in range(4))
    assert "reference" in done.stdout and "task.height" not in done.stdout.partition("sweep ")[2]


@pytest.mark.thorough
def test_refused_jobs_do_not_end_a_sweep_of_two_processes(tmp_path: Path) -> None:
    asked = ("vae=replicated,parallel_decode", "topology=cpu_x2", "task.num_frames=9,8")
    joblib = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={tmp_path}")
    # In an interpreter of its own: a fork would wait five minutes for joblib's idle workers before it ends.
    done = launch("-m", *joblib, *SMALL, *asked, PYTHONUNBUFFERED="1")
    assert done.returncode == 1, done.stderr
    assert [(row["job"], row["status"]) for row in jobs_of(tmp_path)] == [
        *((0, "done"), (1, "done"), (2, "refused"), (3, "refused"))
    ]
    assert jobs_of(tmp_path)[1]["likeness"] == {"kind": "identical"}
    assert "2 of 4 jobs will be refused: 2, 3" in done.stderr
    assert "job 2, 3 refused: task.num_frames=8 is not 4k + 1" in done.stdout
    assert "task.num_frames=9" in done.stderr and "Traceback" not in done.stderr
    assert not any((tmp_path / "2" / name).exists() for name in ("video.mp4", "metrics.json"))


@pytest.mark.thorough
def test_a_cluster_launcher_runs_plans_wherever_their_folders_are(tmp_path: Path) -> None:
    folders = (
        "hydra.sweep.subdir=n_${hydra.job.num}/x",
        "hydra.output_subdir=null",
        f"hydra.sweep.dir={tmp_path}",
    )
    submitit = ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=20")
    where = f"hydra.sweep.dir={tmp_path}"
    done = launch("-m", *submitit, *folders, where, "job=plan", "topology=cpu_x1,cpu_x2")
    assert done.returncode == 0, done.stderr
    assert [row["status"] for row in jobs_of(tmp_path)] == ["done", "done"]
    assert jobs_of(tmp_path)[1]["folder"] == str(tmp_path / "n_1" / "x")
    assert all(row["planned"]["seconds.total"] > 0 for row in jobs_of(tmp_path))


@pytest.mark.thorough
def test_a_sweep_may_be_asked_for_by_its_mode_and_run_where_its_files_go(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a kite\n")
    asked = ("hydra.mode=MULTIRUN", "hydra.job.chdir=true", "task.prompt_file=prompts.txt", "topology=cpu_x2")
    done = subprocess.run(
        [sys.executable, REPOSITORY / "launch.py", *SMALL, *asked, "hydra.sweep.dir=sweep"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr
    (row,) = jobs_of(tmp_path / "sweep")
    assert (row["status"], row["clips"]) == ("done", 1)


def test_a_sweep_of_which_a_job_cannot_be_composed_does_not_start(tmp_path: Path) -> None:
    done = launch("-m", "job=plan", "topology=cpu_x1,cpu_x3", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert done.returncode == 2
    assert "job 1: topology=cpu_x3 does not exist" in done.stderr and "nothing was started" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.rglob("plan.json"))


@pytest.mark.thorough
def test_a_sweep_goes_on_where_it_was_broken_off(tmp_path: Path) -> None:
    sweep, asked = tmp_path / "sweep", ("-m", "job=plan", "topology=cpu_x1,cpu_x2,cpu_x4", "objective=seconds")
    assert launch(*asked, f"hydra.sweep.dir={sweep}").returncode == 0
    before = {number: (sweep / str(number) / "plan.json").stat().st_mtime_ns for number in range(3)}
    first = [row["objective"] for row in jobs_of(sweep)]
    (sweep / ".jobs" / "1.json").unlink()  # as if it had been killed
    done = launch(*asked, f"sweep.resume={sweep}")
    assert done.returncode == 0 and "2 of 3 jobs are done already: 0, 2" in done.stderr, done.stderr
    assert [row["objective"] for row in jobs_of(sweep)] == first
    after = {number: (sweep / str(number) / "plan.json").stat().st_mtime_ns for number in range(3)}
    assert [number for number in before if before[number] != after[number]] == [1]
    others = launch("-m", "job=plan", "topology=cpu_x1,cpu_x2", "objective=seconds", f"sweep.resume={sweep}")
    assert others.returncode == 2 and "job 2 of" in others.stderr
    nothing = launch(*asked, f"sweep.resume={tmp_path / 'none'}")
    assert nothing.returncode == 2 and "there is no sweep in" in nothing.stderr


@pytest.mark.thorough
def test_repeats_are_interleaved_and_their_medians_are_the_table(tmp_path: Path) -> None:
    asked = ("-m", *SMALL, "topology.threads_per_rank=1", "sweep.repeats=3", f"hydra.sweep.dir={tmp_path}")
    done = launch(*(o for o in asked if not o.startswith("sampler.steps")), "sampler.steps=1,2")
    assert done.returncode == 0, done.stderr
    rows = jobs_of(tmp_path)
    turns = [table.assignments(row["overrides"]) for row in rows]
    assert [(turn["sweep.repeat"], turn["sampler.steps"]) for turn in turns] == [
        (str(repeat), str(steps)) for repeat in range(3) for steps in (1, 2)
    ]
    shown = table.merged(rows)
    assert [row["job"] for row in shown] == [0, 1] and all(row["repeats"] == 3 for row in shown)
    for row, first in zip(shown, (0, 1), strict=True):
        totals = [rows[number]["total_seconds"] for number in range(first, 6, 2)]
        assert row["total_seconds"] == median(totals) and row["spread"] == [min(totals), max(totals)]
    assert "spread s" in done.stdout and "one run of each job" not in done.stdout
    page = (tmp_path / "index.html").read_text()
    assert "spread s" in page and "sweep.repeat=1" not in page
    refused = launch("-m", "hydra/sweeper=optuna", "sweep.repeats=2", "job=plan", "sampler.steps=choice(1,2)")
    assert refused.returncode == 2 and "repeats none" in refused.stderr


def test_what_hydras_sweeper_cannot_do_is_refused_with_what_can() -> None:
    done = launch("-m", "job=plan", "sampler.guidance_scale=interval(1,2)")
    assert done.returncode == 2
    assert "hydra/sweeper=optuna" in done.stderr and "Traceback" not in done.stderr + done.stdout
    assert "Warning" not in done.stderr and "│" not in done.stdout


def tune(script: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """One of examples/tune, whose environment may be another one here."""
    words = (REPOSITORY / "examples" / "tune" / script).read_text()
    command = words.replace(".venv/bin/python", shlex.quote(sys.executable)).replace(
        '"$(dirname "$0")/../.."', "."
    )
    bash = ["bash", "-c", command, script, *overrides]
    return subprocess.run(bash, cwd=REPOSITORY, capture_output=True, text=True, timeout=HANGS)


@pytest.mark.thorough
def test_optuna_finds_the_layout_that_is_planned_fastest(tmp_path: Path) -> None:
    done = tune("layout.sh", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    rows = jobs_of(tmp_path)
    assert sorted({row["status"] for row in rows}) == ["done", "refused"]  # 2 x 4 needs eight ranks
    best = min((row for row in rows if row["objective"] is not None), key=lambda row: row["objective"])
    found = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    assert found["best_value"] == best["objective"] == best["planned"]["seconds.total"]


@pytest.mark.thorough
def test_optuna_finds_the_strategy_that_decodes_fastest_here(tmp_path: Path) -> None:
    done = tune("strategy.sh", *SMALL, f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    rows = jobs_of(tmp_path)
    assert [row["status"] for row in rows] == ["done"] * 3
    found = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    assert found["best_value"] == min(row["seconds"]["decode"] for row in rows)


def test_slurm_is_one_node_per_job_with_its_gpus() -> None:
    done = launch(
        "hydra/launcher=slurm", "model=nano", "topology=h200_x8", "--cfg", "hydra", "-p", "hydra.launcher"
    )
    assert done.returncode == 0, done.stderr
    resolved = launch("hydra/launcher=slurm", "topology=h200_x8", "--cfg", "all", "--resolve").stdout
    launcher = yaml.safe_load(resolved)["hydra"]["launcher"]
    assert (launcher["nodes"], launcher["tasks_per_node"], launcher["gpus_per_node"]) == (1, 1, 8)


def test_a_sweep_that_is_stopped_prints_its_table(tmp_path: Path) -> None:
    sweep = tmp_path / "jobs"
    command = [
        sys.executable,
        "launch.py",
        "-m",
        *SMALL,
        "topology=cpu_x2",
        "sampler.steps=1,900",
        "sampler.flow_shift=1",
    ]
    run = subprocess.Popen(
        [*command, f"hydra.sweep.dir={sweep}"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for_ranks(run.pid, 2, until=lambda: (sweep / ".jobs" / "0.json").is_file())
    run.send_signal(signal.SIGINT)
    shown, errors = run.communicate(timeout=HANGS)
    assert run.returncode == 130, errors
    assert [row["status"] for row in jobs_of(sweep)] == ["done", "broken off"]
    assert "job 1 broken off" in shown
