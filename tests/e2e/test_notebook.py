"""`from cosmos3_pipeline import compose, plan, run`: what launch.py does, from a script or a notebook."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from limits import HANGS

from cosmos3_pipeline import compose, plan, run
from cosmos3_pipeline.config import config_dir
from cosmos3_pipeline.config.plugins import register
from cosmos3_pipeline.errors import ConfigError
from cosmos3_pipeline.planning.summary import summary

pytestmark = pytest.mark.ranks


def test_a_script_without_a_guard_runs_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "first.py"
    script.write_text(
        "from cosmos3_pipeline import plan, run\n"
        f"asked = [*{SMALL!r}, 'topology=cpu_x2']\n"
        "print(plan(asked))\n"
        "made = run(asked, 'made')\n"
        "print(made.picture, made.metrics['topology']['ranks'])\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=HANGS, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("plan: toy_random t2v, 96x80") and done.stdout.endswith("made/video.mp4 2\n")
    origin = json.loads((tmp_path / "made" / "metrics.json").read_text())["origin"]
    assert origin["command"].startswith("cosmos3 model=toy_random task.height=80")


def test_overrides_a_config_and_hydras_own_composition_are_one_run(tmp_path: Path) -> None:
    config = compose(SMALL)
    register()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        composed = hydra_compose("config", overrides=list(SMALL))
    assert plan(SMALL) == plan(config) == plan(composed)
    made = [run(asked, tmp_path / str(number)) for number, asked in enumerate((SMALL, config, composed))]
    assert len({one.metrics["frames_sha256"] for one in made}) == 1
    assert made[0].objective is None and made[0].picture.name == "video.mp4"
    planned = run([*SMALL, "job=plan", "objective=seconds"], tmp_path / "plan")
    assert planned.objective == summary(plan(SMALL))["seconds.total"]


def test_what_cannot_be_done_is_refused_before_there_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.num_frames=8"):
        run([*SMALL, "task.num_frames=8"], tmp_path / "never")
    assert not (tmp_path / "never").exists()
