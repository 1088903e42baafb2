"""No value of any key ends in a traceback, runs for ever, or is accepted and ignored; `make fuzz` tries all."""

from __future__ import annotations

import os
import random

import config_fuzz
import pytest
from config_fuzz import VALUES, Case, cases, verdict

from cosmos3_pipeline.config.compose import compose
from cosmos3_pipeline.config.kinds import schema_keys
from cosmos3_pipeline.planning import checks

SEED, SAMPLE = 36, 25


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "located", checks.located)  # `verdict` puts another in its place


def test_every_key_is_tried_with_every_value() -> None:
    tried = {(case.key, case.value) for case in cases()}
    assert {(key, value) for key in schema_keys() for value in VALUES} <= tried
    assert ("vae.decode.tile_sample_min_height", "nan") in tried


@pytest.mark.long
def test_a_sample_is_refused_or_taken() -> None:
    everything = cases()
    sample = (
        everything if os.environ.get("COSMOS3_FUZZ") == "all" else random.Random(SEED).sample(everything, SAMPLE)
    )
    wrong = {str(case): found for case in sample if (found := verdict(case)) is not None}
    assert wrong == {}


def test_the_judge_sees_what_is_ignored_and_what_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("output.crf", "30", ("job=plan", "model=toy_random"))
    assert verdict(case) is None
    monkeypatch.setattr(config_fuzz, "compose", lambda overrides: compose(overrides[:-1]))
    assert verdict(case) == "accepted and ignored: it is 17"
    monkeypatch.setattr(config_fuzz, "compose", lambda overrides: {}[overrides[-1]])
    assert verdict(case) == "KeyError: 'output.crf=30'"
