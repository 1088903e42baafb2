"""Ray as a launcher: jobs in its workers, outcomes in this sweep's table. Large, so `make interop` installs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import SMALL, launch

pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="make interop installs it")
pytestmark = pytest.mark.ranks


def test_jobs_run_in_rays_workers_and_a_refused_one_is_told(tmp_path: Path) -> None:
    ray = ("hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2", f"hydra.sweep.dir={tmp_path}")
    done = launch("-m", *SMALL, *ray, "topology=cpu_x1,cpu_x2", "topology.cfg=1,2", RAY_DISABLE_IMPORT_WARNING="1")
    rows = json.loads((tmp_path / "sweep.json").read_text())["jobs"]
    statuses = {(row["overrides"][-2], row["overrides"][-1]): row["status"] for row in rows}
    assert statuses["topology=cpu_x1", "topology.cfg=1"] == "done", done.stderr
    assert statuses["topology=cpu_x2", "topology.cfg=2"] == "done", done.stderr
    assert statuses["topology=cpu_x1", "topology.cfg=2"] == "refused"
    (refused,) = [row for row in rows if row["overrides"][-2:] == ["topology=cpu_x1", "topology.cfg=2"]]
    assert "topology.cfg" in refused["reason"] and "\n\n\n" not in refused["error"]
    assert done.returncode == 1
