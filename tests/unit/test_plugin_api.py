"""A strategy package imports one module. The names in that module stay."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cosmos3_pipeline import plugin_api

ROOT = Path(__file__).parents[2]
PROMISED = {
    *("EVERY", "Assignment", "Block", "Rect", "LatentShape", "Op", "Program", "Direction"),
    *("Strategy", "StrategyError", "StrategyPlan", "RankShare", "Exactness", "OwnRunner", "Runner"),
    *("ChunkCosts", "LineTimes", "RooflineCosts", "Link", "op_costs", "op_seconds", "slab_costs"),
    *("LineCuts", "line_cuts", "Rates"),
    *("Found", "search", "discover", "Lowered", "lower", "account"),
    *("BoundVae", "Comm", "Pending", "Execution", "Flow", "Frames", "Pixels"),
    *("as_pixels", "latent_chunk", "latent_shape", "picture_chunk"),
}


def test_the_promised_names_are_there() -> None:
    assert set(plugin_api.__all__) == PROMISED
    assert all(hasattr(plugin_api, name) for name in PROMISED)


def test_strategies_import_nothing_else_of_the_library() -> None:
    found = [*ROOT.glob("plugins/**/*.py"), *ROOT.glob("examples/*/*/*.py")]
    files = [file for file in found if "Strategy)" in file.read_text(encoding="utf-8")]
    assert len(files) > 6
    for file in files:
        others = set(re.findall(r"(?:from|import) (cosmos3_pipeline[\w.]*)", file.read_text(encoding="utf-8")))
        assert others <= {"cosmos3_pipeline.plugin_api"}, f"{file} imports {others}"


@pytest.mark.ranks
def test_it_imports_no_torch() -> None:
    code = "import sys, cosmos3_pipeline.plugin_api; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
