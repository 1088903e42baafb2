"""A repository of its own with its own configs, installed beside the library: examples/downstream."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, environment_with, launch, metrics
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from limits import HANGS
from warm import run_forked

from cosmos3_pipeline import plan
from cosmos3_pipeline.config.compose import Composition
from cosmos3_pipeline.planning.checks import check_composition
from cosmos3_pipeline.review.revisions import git

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_with(REPOSITORY / "examples" / "downstream", tmp_path_factory.mktemp("fresh"))


def films(python: Path, cwd: Path, *args: str, module: bool = False) -> subprocess.CompletedProcess[str]:
    """`kite-films *args`, or the same by `python -m`."""
    program = [str(python), "-m", "kite_films.make"] if module else [str(python.parent / "kite-films")]
    return subprocess.run([*program, *args], cwd=cwd, capture_output=True, text=True, timeout=HANGS)


def test_its_defaults_options_strategy_and_keys_make_its_film(python: Path, tmp_path: Path) -> None:
    # In a warm interpreter, because this one computes; the other tests start new ones.
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = run_forked(python.parent / "kite-films", "hydra.run.dir=made", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    report, saved = metrics(tmp_path / "made"), yaml.safe_load((tmp_path / "made" / "config.yaml").read_text())
    assert done.stdout.startswith("film the red circle\n")
    assert (report["model"], report["vae"]["decode"]["strategy"], report["num_frames"]) == ("little", "columns", 9)
    assert saved["extras"] == {"film": "the red circle", "tags": ["kite"]}
    again = launch("--config-path", str(tmp_path / "made"), "--config-name", "config", "hydra.run.dir=made/again")
    assert (
        again.returncode == 2 and "no installed strategy plugin owns it" in again.stderr
    )  # it is not installed here


@pytest.mark.thorough
def test_torchruns_ranks_compose_its_configs(python: Path, tmp_path: Path) -> None:
    torchrun = [str(python), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    asked = ["-m", "kite_films.make", "experiment=long", "hydra.run.dir=made"]
    done = subprocess.run([*torchrun, *asked], cwd=tmp_path, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "made")["num_frames"] == 13


def test_an_error_names_its_file(python: Path, tmp_path: Path) -> None:
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    (own / "wrong.yaml").write_text("# @package _global_\ntask:\n  num_frames: 6\n")
    asked = ("topology=cpu_x2", "sampler.guidance_scale=1", "experiment=wrong", "--config-dir", "own")
    refused = films(python, tmp_path, *asked)
    assert refused.returncode == 2
    assert "set:   task.num_frames by own/experiment/wrong.yaml:3" in refused.stderr
    assert "topology.cfg by cosmos3_pipeline/conf/topology/cpu_x2.yaml" in refused.stderr
    assert "did you mean experiment=long?" in films(python, tmp_path, "experiment=lnog", module=True).stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "own"]  # nothing was started


def test_its_sweep_and_its_help_have_its_options(python: Path, tmp_path: Path) -> None:
    swept = films(python, tmp_path, "-m", "job=plan", "topology=box,cpu_x1", "hydra.sweep.dir=sweep")
    assert swept.returncode == 0, swept.stderr
    assert (tmp_path / "sweep" / "index.html").is_file()
    told = films(python, tmp_path, "--help").stdout
    assert "kite-films job=plan" in told and re.search("box +Choose for the machine in the cellar", told)


def test_its_configs_are_reviewed(python: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(REPOSITORY / "examples" / "downstream", project, ignore=shutil.ignore_patterns("__pycache__"))
    git(project, "init", "-q")
    git(project, "add", "-A")
    git(project, "-c", "user.name=n", "-c", "user.email=n@example.org", "commit", "-q", "-m", "films")
    model = project / "kite_films" / "conf" / "model" / "little.yaml"
    model.write_text(model.read_text().replace("steps: 2", "steps: 4"))
    where = ("--conf", "kite_films/conf", "--config-name", "kite_films", "--format", "json")
    review = [str(python), "-m", "cosmos3_pipeline", "diff", *where]
    done = subprocess.run(review, cwd=project, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 1, done.stderr
    (change,) = json.loads(done.stdout)["changes"]
    assert (change["key"], change["old"], change["new"]) == ("model.recommended.video.steps", 2, 4)
    assert {"default", "experiment=long", "topology=box", "vae/decode=columns"} <= set(change["cases"])


@pytest.mark.thorough
def test_a_run_is_done_again_from_what_it_saved(tmp_path: Path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    assert launch("model=toy_random", "sampler.steps=2", f"hydra.run.dir={run}").returncode == 0
    for folder in (run, run / ".hydra"):
        done = launch("--config-path", str(folder), "--config-name", "config", f"hydra.run.dir={again}")
        assert done.returncode == 0, done.stderr
        assert metrics(again)["frames_sha256"] == metrics(run)["frames_sha256"]
    refused = launch("--config-path", str(run), "--config-name", "config", "vae=tiled")
    assert refused.returncode == 2 and "a config that a run has saved is values only" in refused.stderr
    wrong = launch("--config-path", str(run), "--config-name", "config", "sampler.stepz=3")
    assert "did you mean sampler.steps?" in wrong.stderr


def test_hydra_composes_the_package_without_a_call_of_ours() -> None:
    code = (
        "from hydra import compose, initialize_config_module\n"
        "with initialize_config_module('cosmos3_pipeline.conf', version_base='1.3'):\n"
        "    print(compose('config', ['topology=cpu_x2']).topology.cfg)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=HANGS
    )
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
    with initialize_config_module("cosmos3_pipeline.conf", version_base="1.3"):
        composed = hydra_compose("config", ["+extras.tags=[kite]"])
    assert check_composition(Composition(composed, None)).config.extras == {"tags": ["kite"]}
    assert plan(composed) == plan()
