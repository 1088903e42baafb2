"""A run composes once, checks once and plans once, all of it in the launching process.

Its ranks do none of it: test_installed.py counts two of them in a run from the wheel.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import REPOSITORY, SMALL, launch, metrics
from counted_processes import ONCE, counting_in, counts
from limits import HANGS


@pytest.fixture
def counting(tmp_path: Path) -> dict[str, str]:
    return counting_in(tmp_path)


@pytest.mark.thorough
def test_one_rank_runs_where_all_was_decided(tmp_path: Path, counting: dict[str, str]) -> None:
    done = launch(*SMALL, f"hydra.run.dir={tmp_path / 'run'}", **counting)
    assert done.returncode == 0, done.stderr
    assert counts(counting) == [ONCE + Counter(rank=1)]


def test_a_plan_is_made_once(tmp_path: Path, counting: dict[str, str]) -> None:
    overrides = ["job=plan", "model=nano", "task=i2v", "topology=h200_x4", f"hydra.run.dir={tmp_path / 'run'}"]
    done = launch(*overrides, **counting)
    assert done.returncode == 0, done.stderr
    assert counts(counting) == [ONCE + Counter({"plan vae": 1})]


def test_a_config_is_shown_after_one_composition(counting: dict[str, str]) -> None:
    done = launch("--cfg", "job", **counting)
    assert done.returncode == 0, done.stderr
    (found,) = counts(counting)
    assert (found["compose"], found["check"], found["plan"]) == (1, 1, 0)


@pytest.mark.thorough
def test_a_job_of_a_sweep_is_planned_before_the_first_starts_and_as_it_starts(
    tmp_path: Path, counting: dict[str, str]
) -> None:
    sweep = [f"hydra.sweep.dir={tmp_path / 'sweep'}", "sampler.seed=1,2"]
    done = launch("-m", *SMALL, *sweep, **counting)
    assert done.returncode == 0, done.stderr
    launcher, *ranks = counts(counting)
    assert ranks == [Counter(rank=1), Counter(rank=1)]
    # Hydra itself composes twice for the sweep, and each job once to see that it can and once to run it; so do we.
    assert launcher == Counter({"compose": 2 + 3 * 2, **{word: 4 for word in ONCE if word != "compose"}})


@pytest.mark.thorough
def test_under_torchrun_each_rank_decides_once_and_one_writes(tmp_path: Path, counting: dict[str, str]) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [*torchrun, "launch.py", *SMALL, "topology=cpu_x2", f"hydra.run.dir={tmp_path / 'run'}"],
        cwd=REPOSITORY,
        env={**os.environ, **counting},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr
    assert counts(counting) == [ONCE + Counter(rank=1)] * 2
    assert metrics(tmp_path / "run")["topology"]["ranks"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["count", "run", "site"]
    assert done.stdout.count("video.mp4") == 1
