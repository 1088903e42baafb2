"""The plans of all checked-in cases are as they were: a change of conf/ or of the arithmetic shows here.

To accept a change: COSMOS3_ACCEPT=1 python -m pytest tests/unit/test_plan_golden.py, then commit plans.json.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from options import TASK_NEEDS

from cosmos3_pipeline import compose
from cosmos3_pipeline.config import config_dir
from cosmos3_pipeline.planning import plan_of
from cosmos3_pipeline.review.revisions import CASES_FILE, read_cases

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests" / "golden" / "plans.json"
ACCEPT = "COSMOS3_ACCEPT=1 python -m pytest tests/unit/test_plan_golden.py"


def cases() -> dict[str, list[str]]:
    groups = ("experiment", "model", "topology", "task", "vae")
    options = [f"{group}={p.stem}" for group in groups for p in sorted((config_dir() / group).glob("*.yaml"))]
    found = {option: [option, *TASK_NEEDS.get(option.removeprefix("task="), [])] for option in options}
    return {"default": [], **found, **read_cases(REPOSITORY / CASES_FILE)}


@pytest.fixture(scope="module")
def golden() -> dict[str, dict]:
    if os.environ.get("COSMOS3_ACCEPT") == "1":
        plans = {name: plan_of(compose(overrides))["summary"] for name, overrides in cases().items()}
        GOLDEN.write_text(json.dumps(plans, indent=1) + "\n")
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("name", list(cases()))
def test_the_plan_is_the_golden_one(golden: dict[str, dict], name: str) -> None:
    new = plan_of(compose(cases()[name]))["summary"]
    old = golden.get(name, {})
    moved = [f"{k}: {old.get(k)} -> {new.get(k)}" for k in {**old, **new} if old.get(k) != new.get(k)]
    assert not moved, f"the plan of {name} changed:\n  " + "\n  ".join(moved) + f"\nif that is meant: {ACCEPT}"


def test_no_golden_plan_is_left_over(golden: dict[str, dict]) -> None:
    assert set(golden) == set(cases()), f"cases came or went; if that is meant: {ACCEPT}"
