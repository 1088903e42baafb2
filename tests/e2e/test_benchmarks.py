"""The programs in benchmarks/ as a user runs them: a tiny case on two ranks, and the clock's table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from limits import HANGS

from cosmos3_pipeline.plugin_api import LatentShape, op_seconds
from cosmos3_pipeline.vae.program import program_for
from cosmos3_plugins.layer_pipeline import LayerPipeline

SMALL = ("--rows", "4", "--cols", "2", "--frames", "2", "--rounds", "2", "--seconds", "0")


def run(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "plugins")])
    command = [sys.executable, f"benchmarks/{program}", *args]
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=HANGS)


@pytest.mark.thorough
def test_a_case_on_two_ranks_beside_another_checkout(tmp_path: Path) -> None:
    """The other checkout is this one: its results have the same bits."""
    names = ("roofline", "one_rank", "layer_pipeline", "spatial_shard", "distvae", "nobody")
    other = tmp_path / "other"
    other.mkdir()
    for folder in ("cosmos3_pipeline", "plugins"):
        (other / folder).symlink_to(REPOSITORY / folder)
    arguments = ("--cases", "layer_pipeline", *SMALL, "--contestants", *names, "--old", str(other))
    done = run("vae.py", *arguments, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads((tmp_path / "vae.json").read_text())
    assert report["date"] and report["revision"] and report["machine"]["torch"] and report["ranks"] == 2
    case = report["cases"]["layer_pipeline"]
    assert (case["frames"], case["rows"], case["cols"]) == (2, 4, 2)
    assert "no strategy nobody" in case["absent"]["nobody"]
    rows = case["contestants"]
    assert set(rows) == set(names) - set(case["absent"]) >= {"roofline", "one_rank", "layer_pipeline"}
    assert all(len(row["rounds"]) == 2 and min(row["rounds"]) > 0 for row in rows.values())
    assert [row["ranks"] for row in (rows["one_rank"], rows["layer_pipeline"])] == [1, 2]
    assert rows["layer_pipeline"]["checked"][0]["equal"]
    shard = rows["spatial_shard"]["checked"][0]
    assert shard["equal"] or shard["psnr_db"] >= 100
    assert rows["layer_pipeline"]["clock_s"] > 0 < rows["spatial_shard"]["clock_s"]
    assert all(answer["peak_bytes"] > 0 < answer["sent_bytes"] for answer in rows["layer_pipeline"]["checked"])
    assert set(case["old"]) == {"one_rank", "layer_pipeline", "spatial_shard"}
    for name, row in case["old"].items():
        assert row["checked"][0]["digest"] == rows[name]["checked"][0]["digest"]
    assert report["costs"]["link"]["bytes_per_s"] > 1e6
    markdown = (tmp_path / "vae.md").read_text()
    assert "| layer_pipeline | 2 |" in markdown and "the same bits" in markdown and markdown in done.stdout

    # What its ops took divides a line.
    program, shape = program_for("decode", report["vae"]), LatentShape(1, 9, 4, 2)
    seconds = op_seconds(str(tmp_path / "vae.json")).costs(program, 8, 4)
    alone = report["costs"]["cases"]["layer_pipeline"]["alone"]
    assert [op["later_s"] for op in alone] == list(seconds.later)
    plan = LayerPipeline(op_seconds=str(tmp_path / "vae.json")).plan(program, shape, 2)
    assert "by measured seconds of ops" in plan.note
    # And the clock takes them.
    toy = ("model=toy_random", "topology=cpu_x2", "vae=parallel_decode")
    done = run("simulate.py", *toy, "--costs", str(tmp_path / "vae.json"), "--ranks", "2", "--serial", "4")
    assert done.returncode == 0 and "| layer_pipeline | 2 |" in done.stdout, done.stderr


@pytest.mark.thorough
def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    done = run(
        "vae.py",
        "--cases",
        "layer_pipeline",
        *SMALL,
        "--ranks",
        "1",
        "--old",
        str(tmp_path),
        "--out",
        str(tmp_path),
    )
    assert done.returncode == 1
    assert f"{tmp_path} is no checkout of this project: its ranks import" in done.stderr


def test_the_clock_needs_no_torch_and_leaves_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    code = (
        f"import runpy, sys; sys.argv = ['simulate.py', '--ranks', '2', '4', '--trace', {str(trace)!r}];"
        "runpy.run_path('benchmarks/simulate.py', run_name='__main__'); assert 'torch' not in sys.modules"
    )
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "plugins")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr
    assert "| spatial_shard | 4 | 2.2" in done.stdout
    assert {event["tid"] for event in json.loads(trace.read_text())["traceEvents"]} == set(range(4))
