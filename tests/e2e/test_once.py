"""A run composes once, checks once and plans once, all of it in the launching process; its ranks do none of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import REPOSITORY, SMALL, launch, metrics
from limits import HANGS

# Python imports it in every process that finds it on its path: in the launcher and in each rank.
SITECUSTOMIZE = """
import functools, importlib.abc, importlib.machinery, os, sys

COUNTED = {
    "hydra._internal.config_loader_impl": ("ConfigLoaderImpl", "load_configuration", "compose"),
    "cosmos3_pipeline.config.checks": (None, "problems", "check structure"),
    "cosmos3_pipeline.planning.checks": (None, "check", "check"),
    "cosmos3_pipeline.planning.vae": (None, "vae_plan", "plan vae"),
    "cosmos3_pipeline.planning.plan": (None, "make_plan", "plan"),
    "cosmos3_pipeline.jobs.rank": (None, "run_rank", "rank"),
}


class Counting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in COUNTED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module

        def counted(module):
            run(module)
            owner, function, word = COUNTED[name]
            owner = module if owner is None else getattr(module, owner)
            setattr(owner, function, told(getattr(owner, function), word))

        spec.loader.exec_module = counted
        return spec


def told(function, word):
    @functools.wraps(function)
    def call(*args, **kwargs):
        with open(os.environ["COSMOS3_COUNT"], "a") as file:
            file.write(f"{os.getpid()} {word}\\n")
        return function(*args, **kwargs)

    return call


sys.meta_path.insert(0, Counting())
"""


@pytest.fixture
def counting(tmp_path: Path) -> dict[str, str]:
    """The environment of a command that counts."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "COSMOS3_COUNT": str(tmp_path / "count")}


def counts(counting: dict[str, str]) -> list[Counter[str]]:
    """What each process did, in the order in which they began."""
    processes: dict[str, Counter[str]] = {}
    for line in Path(counting["COSMOS3_COUNT"]).read_text().splitlines():
        process, _, word = line.partition(" ")
        processes.setdefault(process, Counter())[word] += 1
    return list(processes.values())


# With one clip from text the VAE has one direction to plan; one with a picture to begin from has two.
ONCE = Counter({"compose": 1, "check structure": 1, "check": 1, "plan vae": 1, "plan": 1})


@pytest.mark.thorough
def test_one_rank_runs_where_all_was_decided(tmp_path: Path, counting: dict[str, str]) -> None:
    done = launch(*SMALL, f"hydra.run.dir={tmp_path / 'run'}", **counting)
    assert done.returncode == 0, done.stderr
    assert counts(counting) == [ONCE + Counter(rank=1)]


def test_ranks_are_given_what_was_decided(tmp_path: Path, counting: dict[str, str]) -> None:
    done = launch(*SMALL, "topology=cpu_x2", "vae/decode=auto", f"hydra.run.dir={tmp_path / 'run'}", **counting)
    assert done.returncode == 0, done.stderr
    assert counts(counting) == [ONCE, Counter(rank=1), Counter(rank=1)]


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
