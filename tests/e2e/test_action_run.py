"""Tasks with actions as a user runs them: the files that they leave, and what they do not read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from action_runs import CHUNK, asked, write_inputs
from conftest import launch

from cosmos3_pipeline.planning.action_files import UNITS

pytestmark = pytest.mark.long


def test_a_clip_becomes_actions_and_no_video(tmp_path: Path) -> None:
    write_inputs(tmp_path, 100, 133)
    output = tmp_path / "run"
    done = launch(*asked(tmp_path, "inverse_dynamics"), f"hydra.run.dir={output}")
    assert done.returncode == 0, done.stderr + done.stdout
    assert str(output / "actions.json") in done.stdout
    report = json.loads((output / "actions.json").read_text())
    assert (report["domain"], report["mode"], report["fps"]) == ("bridge_orig_lerobot", "inverse_dynamics", 5.0)
    assert [len(row) for row in report["actions"]] == [len(report["columns"])] * CHUNK == [10] * CHUNK
    assert report["units"] == UNITS
    metrics, plan = (json.loads((output / f"{name}.json").read_text()) for name in ("metrics", "plan"))
    assert (metrics["picture"], metrics["actions"]) == (None, "actions.json")
    assert not list(output.glob("*.mp4"))
    # The encoder's weights are all that is read of the VAE, and the plan says so.
    assert metrics["loading"]["vae"]["ranks"][0]["kept_bytes"] == plan["ranks"][0]["weight_bytes"]["vae"]
    assert "decode" not in plan["stages"]
