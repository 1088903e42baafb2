"""The plugin in examples/ as a third party's: built, installed into an environment of its own, chosen by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, SMALL, environment_with, metrics
from limits import HANGS

EXAMPLE = REPOSITORY / "examples" / "wavefront"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_with(EXAMPLE, tmp_path_factory.mktemp("fresh"))


def launch(python: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(python), "launch.py", *SMALL, *args], cwd=REPOSITORY, capture_output=True, text=True, timeout=HANGS
    )


def test_it_is_not_in_this_environment() -> None:
    code = "from cosmos3_pipeline.config.plugins import discover; assert 'wavefront' not in discover().strategies"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANGS)


@pytest.mark.thorough
def test_a_run_chooses_it_by_name_and_makes_the_same_frames(python: Path, one_rank: Path, tmp_path: Path) -> None:
    chosen = ("topology=cpu_x2", "vae/decode=wavefront", "vae.decode.in_a_row=2")
    done = launch(python, *chosen, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    one, two = metrics(one_rank), metrics(tmp_path)
    assert two["vae"]["decode"].items() >= {"strategy": "wavefront", "exactness": "bitwise"}.items()
    assert two["frames_sha256"] == one["frames_sha256"]
    assert all(rank["wire"]["send"]["bytes"] > 0 for rank in two["stages"]["decode"]["ranks"])


def test_more_ranks_than_chunks_are_refused_before_anything_starts(python: Path) -> None:
    done = launch(python, "topology=cpu_x4", "topology.ranks_per_node=4", "vae/decode=wavefront")
    assert done.returncode == 2
    assert "wavefront over 4 ranks" in done.stderr
    assert "use 3 ranks or fewer, or a longer clip" in done.stderr


@pytest.mark.thorough
def test_it_verifies(python: Path, tmp_path: Path) -> None:
    done = launch(
        python,
        "job=verify",
        "topology=cpu_x2",
        "verify.strategies=[wavefront]",
        f"hydra.run.dir={tmp_path / 'out'}",
    )
    assert done.returncode == 0, done.stderr
    (check,) = json.loads((tmp_path / "out" / "verify.json").read_text())["checks"]
    assert (check["strategy"], check["reached"], check["passed"]) == ("wavefront", "bitwise", True)


@pytest.mark.thorough
def test_it_conforms(python: Path, tmp_path: Path) -> None:
    kit, few = ["--pyargs", "cosmos3_pipeline.plugin_kit"], ["--max-ranks", "2", "-k", "not tall and not bfloat16"]
    done = subprocess.run(
        [str(python), "-m", "pytest", "-q", *kit, "--strategy", "cosmos3_wavefront:Wavefront", *few],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout and "declares" not in done.stdout  # its entry point was found and has its name
