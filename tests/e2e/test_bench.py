"""`job=bench` as a user runs it: two ranks, two small cases, and what it leaves."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from conftest import launch
from PIL import Image


def test_two_cases_on_two_ranks(tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = launch(
        *("job=bench", "topology=cpu_x2", "bench.cases=[layer_pipeline,spatial_shard]", "bench.rounds=2"),
        "bench.seconds=0",
        *("bench.rows=4", "bench.cols=2", "bench.frames=2", f"hydra.run.dir={output}"),
    )
    assert done.returncode == 0, done.stderr + done.stdout  # whatever targets are missed
    report = json.loads((output / "bench.json").read_text())
    assert (report["schema_version"], report["ranks"], report["rounds"]) == (1, 2, 2)
    case = report["cases"]["layer_pipeline"]
    assert (case["latent_frames"], case["latent_rows"], case["latent_cols"]) == (2, 4, 2)
    rows = case["contestants"]
    assert ("distvae" in case["absent"]) == (find_spec("distvae") is None)
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows.values())
    assert rows["diffusers"]["max_abs"] == 0 < rows["one_rank"]["max_abs"] < 1e-4
    pipeline = rows["layer_pipeline"]
    assert pipeline["max_abs"] == rows["one_rank"]["max_abs"]  # bitwise the same picture
    assert pipeline["weight_bytes"] == pipeline["planned_weight_bytes"]
    # Both hold those of the ops over which the cut between them moves.
    assert 1 <= sum(pipeline["weight_bytes"]) / rows["one_rank"]["weight_bytes"][0] < 1.15
    picture = 3 * 5 * 64 * 32 * 4  # which the root sends to the other rank
    assert pipeline["sent_bytes"][0] == picture and pipeline["sent_bytes"][1] > 0
    each = report["cases"]["spatial_shard"]["contestants"]["one_rank_each"]
    alone = report["cases"]["spatial_shard"]["contestants"]["one_rank"]
    assert len(each["peak_bytes"]) == 2  # two ranks, each with one rank's work
    assert each["planned_peak_bytes"] == 2 * alone["planned_peak_bytes"]
    assert report["not_run"] == []
    costs = report["costs"]
    assert {op["rows"] for op in costs["cases"]["layer_pipeline"]["ops"]} == {4, 2}
    assert len(costs["cases"]["layer_pipeline"]["alone"]) == len(costs["cases"]["layer_pipeline"]["ops"]) / 2
    assert all(case["message"]["seconds"] > 0 < case["message"]["bytes"] for case in costs["cases"].values())
    # By what was measured before the line, not by what was measured after it too.
    divided = json.loads((output / "op_seconds_layer_pipeline.json").read_text())
    assert divided["vae"] == report["vae"] and list(divided["costs"]["cases"]) == ["layer_pipeline"]
    before, after = (each["cases"]["layer_pipeline"]["alone"] for each in (divided["costs"], costs))
    assert before != after and [op["name"] for op in before] == [op["name"] for op in after]
    assert pipeline["note"] == "divided by what its ops take here" != rows["one_rank"]["note"]
    assert costs["link"]["latency_s"] > 0 and costs["link"]["bytes_per_s"] > 1e6
    for target in report["targets"]:
        assert (target["met"] is None) == (target["over"] in case["absent"])
        assert target["met"] is None or target["low"] <= target["value"] <= target["high"]
    markdown = (output / "bench.md").read_text()
    assert "layer_pipeline: at least 1.85 times as fast as one_rank" in markdown
    assert "fewer than 5: provisional" in markdown
    assert "layer_pipeline" in done.stdout
    plots = [output / "bench.png", output / "bench_targets.png"]
    if find_spec("matplotlib") is None:
        assert not any(plot.exists() for plot in plots) and "There are no plots" in markdown
    else:
        assert all(Image.open(plot).width > 500 for plot in plots)
    assert not list(output.glob("*.partial"))
