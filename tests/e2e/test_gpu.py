"""benchmarks/gpu.sh without a GPU: a CPU in the accelerator's branches takes its place, at small sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from limits import HANGS

from cosmos3_pipeline.vae.plugins import discover

STEPS = ("machine", "exact", "decode", "kernels", "denoise", "whole")


def gpu_sh(out: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "benchmarks/gpu.sh", "--device", "cpu", "--small", "--out", str(out), *args]
    env = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=HANGS)


@pytest.mark.thorough
def test_a_rehearsal_without_a_gpu_reports_every_step(tmp_path: Path) -> None:
    done = gpu_sh(tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert done.returncode == 0, report
    assert report == done.stdout.removesuffix("\n")
    assert "A rehearsal on a CPU" in report
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in STEPS}
    for name in STEPS:
        assert f"| {name} | done |" in report and f"\n## {name}\n" in report
        assert not found[name]["wrong"]

    messages = found["machine"]["tables"]["messages between accelerators"]
    assert len(messages) == 2 * 6 and {row["result"] for row in messages} == {"arrives"}
    tables = {title: rows for title, rows in found["exact"]["tables"].items() if "latent frames" in title}
    assert len(tables) == 4
    for rows in tables.values():
        strategies = {row["strategy"].split()[0] for row in rows}
        assert strategies == {"one", *discover().strategies}
        assert all(row["result"] in ("bitwise", "rounding") for row in rows)
        shards = [row for row in rows if row["strategy"].startswith("spatial_shard")]
        assert len(shards) == 3 and all(float(row["sent"].split()[0]) > 0 for row in shards)
    ways = {
        row["way"]
        for step in ("decode", "denoise")
        for rows in found[step]["tables"].values()
        for row in rows
        if "way" in row
    }
    assert ways == {"diffusers", "one rank"}
    for title, rows in found["whole"]["tables"].items():
        if not title.startswith("longest"):
            assert [row["stage"] for row in rows] == ["text", "denoise", "decode"]


@pytest.mark.thorough
def test_a_step_that_fails_is_reported_and_stops_no_other(tmp_path: Path) -> None:
    done = gpu_sh(tmp_path, "--steps", "whole", "machine", "--topology", "of_nobody")
    assert done.returncode == 1
    assert "| whole | failed with exit code 1 |" in done.stdout and "topology=of_nobody" in done.stdout
    assert "- **whole**: failed with exit code 1" in done.stdout
    assert "| machine | done |" in done.stdout


def test_a_step_is_ended_when_its_time_is_over(tmp_path: Path) -> None:
    done = gpu_sh(tmp_path, "--steps", "exact", "machine", "--seconds", "1")
    assert done.returncode == 1
    assert "| exact | ended after its limit of 1 s |" in done.stdout
    assert "| machine | not run: the time was over |" in done.stdout
