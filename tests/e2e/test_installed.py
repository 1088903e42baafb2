"""The wheel, not the checkout: the `cosmos3` command with its configs and plugins, from an empty directory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import REPOSITORY, SMALL, metrics
from counted_processes import ONCE, counting_in, counts
from limits import HANGS

from cosmos3_pipeline.review.revisions import git


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library installed from a wheel; its dependencies are this environment's."""
    target = tmp_path_factory.mktemp("site")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"),
            *("--target", str(target), str(REPOSITORY)),
        ],
        check=True,
        timeout=HANGS,
    )
    return target


def cosmos3(installed: Path, cwd: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = installed / "bin" / "cosmos3"
    path = os.pathsep.join([*filter(None, [env.get("PYTHONPATH")]), str(installed)])
    return subprocess.run(
        [sys.executable, str(command), *args],
        cwd=cwd,
        env={**os.environ, **env, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )


def test_the_command_runs_from_an_empty_directory_and_its_ranks_are_given_what_was_decided(
    installed: Path, tmp_path: Path
) -> None:
    empty, counting = tmp_path / "empty", counting_in(tmp_path)
    counting["PYTHONPATH"] = counting["PYTHONPATH"].partition(os.pathsep)[0]  # nothing of a checkout
    empty.mkdir()
    done = cosmos3(installed, empty, *SMALL, "topology=cpu_x2", "vae/decode=auto", "hydra.run.dir=out", **counting)
    assert done.returncode == 0, done.stderr
    assert metrics(empty / "out")["vae"]["decode"]["strategy"] == "auto"
    assert sorted(p.name for p in empty.iterdir()) == ["out"]
    assert counts(counting) == [ONCE, Counter(rank=1), Counter(rank=1)]


def test_configs_and_plugins_come_from_the_installation(installed: Path, tmp_path: Path) -> None:
    code = (
        "from cosmos3_pipeline.config import config_dir\n"
        "from cosmos3_pipeline.config.plugins import discover\n"
        "import cosmos3_plugins.layer_pipeline as plugin\n"
        "print(config_dir(), plugin.__file__, sorted(discover().strategies))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(installed)) == 2
    assert "layer_pipeline" in done.stdout and "replicated" in done.stdout


@pytest.mark.thorough
def test_revisions_are_compared_from_the_installation(installed: Path, tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "conf", tmp_path / "conf", ignore=shutil.ignore_patterns("__pycache__"))
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "-c", "user.name=n", "-c", "user.email=n@example.org", "commit", "-q", "-m", "configs")
    same = cosmos3(installed, tmp_path, "diff")
    assert same.returncode == 0 and "Nothing changes" in same.stdout, same.stderr
    experiment = tmp_path / "conf" / "experiment" / "sglang_27037.yaml"
    experiment.write_text(re.sub("seed: .*", "seed: 7", experiment.read_text()))
    changed = cosmos3(installed, tmp_path, "diff")
    assert changed.returncode == 1 and "sampler.seed: 0 -> 7" in changed.stdout, changed.stderr


def test_a_wrong_flag_is_refused_by_the_command_too(installed: Path, tmp_path: Path) -> None:
    done = cosmos3(installed, tmp_path, "task.promt=x")
    assert done.returncode == 2
    assert "did you mean task.prompt?" in done.stderr
    assert not list(tmp_path.iterdir())
