"""`job=plan` as a user calls it: fast, without torch, as table, JSON and markdown; and the search of layouts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANGS

from cosmos3_pipeline import compose
from cosmos3_pipeline.planning import plan_of
from cosmos3_pipeline.planning.plan import make_plan
from cosmos3_pipeline.planning.search import search
from cosmos3_pipeline.planning.summary import summary_lines

pytestmark = pytest.mark.ranks

REPOSITORY = Path(__file__).parents[2]


def launch(*overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch.py", "job=plan", *overrides],
        cwd=REPOSITORY,
        env={**os.environ, "COLUMNS": "220"},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )


def test_a_plan_leaves_json_and_markdown_and_prints_tables(tmp_path: Path) -> None:
    done = launch("experiment=sglang_27037", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["schema_version"] == 1
    assert plan["summary"]["layout"] == "cfg 2 x ulysses 2"
    assert [rank["rank"] for rank in plan["ranks"]] == [0, 1, 2, 3]
    page = (tmp_path / "plan.md").read_text()
    for words in ("layer_pipeline", "bitwise", "44,160 vision tokens", "h200", "published"):
        assert words in page
        assert words in done.stdout.replace("\n", " ")
    assert re.search(r"ops 0-\d+ \(\d+-\d+ not on every chunk\), rows", page)
    left = sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("."))
    assert left == ["log.txt", "plan.json", "plan.md"]


def test_a_plan_needs_neither_photograph_nor_torch() -> None:
    planning = (
        "import sys\n"
        "from cosmos3_pipeline import compose\n"
        "from cosmos3_pipeline.planning import plan_of\n"
        "plan_of(compose(['model=nano', 'task=i2v', 'topology=h200_x8']))\n"
        "assert not {'torch', 'diffusers', 'transformers', 'numpy', 'av'} & set(sys.modules), 'heavy import'\n"
    )
    done = subprocess.run([sys.executable, "-c", planning], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


def test_refused_before_anything_is_written(tmp_path: Path) -> None:
    done = launch("task.height=100", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "task.height=96" in done.stderr and "set:" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_head_of_a_run_says_what_matters() -> None:
    text = "\n".join(summary_lines(make_plan(compose(["model=nano", "topology=h200_x4"]))))
    for words in (
        "nano t2v",
        "1280x720",
        "4 x h200",
        "cfg 2 x ulysses 2",
        "free",
        "layer_pipeline, bitwise",
        "sent",
    ):
        assert words in text


def test_plan_json_is_plain_json() -> None:
    plan = plan_of(compose(["task=i2v", "topology=cpu_x2"]))
    assert json.loads(json.dumps(plan)) == plan
    assert list(plan["stages"]) == ["text", "encode", "denoise", "decode"]


def test_search_ranks_layouts_that_fit_by_time() -> None:
    found = search(compose(["job=plan", "experiment=sglang_27037"]))
    usable = [c for c in found if c.usable]
    assert [c.seconds for c in usable] == sorted(c.seconds for c in usable)
    assert {"topology.cfg=2", "topology.cp=[2,1]", "vae.parallel_decode=true"} <= set(usable[0].overrides)
    slowest = {"topology.cfg=1", "topology.ulysses=1"}
    assert slowest <= set(usable[-1].overrides)
    for candidate in found:  # every line can be pasted behind the same command
        if candidate.plan is not None:
            again = make_plan(compose(["experiment=sglang_27037", *candidate.overrides]))
            assert again.seconds == candidate.plan.seconds


def test_search_tells_what_does_not_fit_and_what_is_refused() -> None:
    too_big = search(
        compose(["job=plan", "model=super", "topology=rtx4090_x1", "topology.accelerator.memory_gb=8"])
    )
    assert [c.usable for c in too_big] == [False, False]
    assert [c.overrides[0] for c in too_big] == ["weights=streamed", "weights=resident"]
    streamed = search(compose(["job=plan", "model=super", "topology=l40s_x1"]))
    assert [c.usable for c in streamed] == [True, False]
    odd = search(compose(["job=plan", "topology.ranks_per_node=6", "topology.ulysses=2"]))
    assert any("heads" in c.refused for c in odd)
    assert [c.plan is None for c in odd] == sorted(c.plan is None for c in odd)


def test_searching_is_a_job(tmp_path: Path) -> None:
    done = launch("plan.search=true", "topology=cpu_x2", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    layouts = json.loads((tmp_path / "search.json").read_text())["layouts"]
    assert layouts[0]["plan"]["fits"] is True
    assert "best first" in done.stdout


@pytest.mark.parametrize("overrides", [[], ["topology=cpu_x4"], ["task=v2v"], ["task=t2i"]])
def test_peaks_are_what_is_held_at_once(overrides: list[str]) -> None:
    for rank in plan_of(compose(overrides))["ranks"]:
        for name, stage in rank["stages"].items():
            held = rank["weight_bytes"]["transformer"] if name == "denoise" else 0
            assert stage["peak_bytes"] >= stage["activation_bytes"] + held
