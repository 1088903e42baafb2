"""The kit passes what is right, and fails what is broken on purpose for the reason that it is broken."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANGS

from cosmos3_pipeline.plugin_kit import ranks as kit_ranks
from cosmos3_pipeline.plugin_kit.cases import CASES, Case
from cosmos3_pipeline.plugin_kit.subject import Subject, SubjectError
from cosmos3_pipeline.vae.blocking import makes_frame_pairs
from cosmos3_pipeline.vae.ops import Conv
from cosmos3_pipeline.vae.plugins import discover

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]


class Outcomes:
    """A pytest plugin that keeps what became of each test."""

    def __init__(self) -> None:
        self.failed: dict[str, str] = {}
        self.passed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("::")[2]
        if report.failed:
            self.failed[name] = report.longreprtext
        elif report.when == "call" and report.passed:
            self.passed.append(name)


def run_kit(strategy: str, *args: str) -> Outcomes:
    """The kit in this process, so that the server that ranks are forked from is started once."""
    outcomes = Outcomes()
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "--rootdir", str(ROOT)]
    pytest.main(
        [*options, "--pyargs", "cosmos3_pipeline.plugin_kit", "--strategy", strategy, *args], plugins=[outcomes]
    )
    assert outcomes.passed or outcomes.failed
    return outcomes


# Other tests hold each strategy against the reference; here the kit is tested, with the clips that differ most.
CLIPS = "not image and not tall and not two"
# One does what the others do, the other is what all are held against.
ONE_CLIP = ("auto", "replicated")


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(discover().strategies))
def test_strategies_that_ship_with_the_library_pass(name: str) -> None:
    chosen = CLIPS + " and not long and not bfloat16" * (name in ONE_CLIP)
    outcomes = run_kit(":".join(discover().target(name).rsplit(".", 1)), "--max-ranks", "2", "-k", chosen)
    assert outcomes.failed == {}
    assert len(outcomes.passed) > 20


# The tests that must find a plugin whose ranks wait for each other.
WAITING = ("as_exact and 2-image-decode", "raises_stops_all and root-encode")
# For each fault of a plugin the tests that must find it, on one clip where they have several, and words of the
# failure that show that it was found for this reason.
BROKEN = {
    "OneBitOff": ("as_exact and 2-clip", "declared bitwise, reached rounding"),
    "RanksDisagree": ("as_exact and 2-clip", "rank 1 of 2: declared bitwise, reached nothing"),
    "RemembersTheLastClip": ("as_exact and 2-clip", "declared bitwise"),
    "AllAtOnce": ("stream_has and 2-clip", "in one piece"),
    "OutOfOrder": ("stream_has and 2-clip", "frames differ from decode"),
    "SendsMoreThanPlanned": ("sends_what and 2-clip", "sent and planned"),
    "HoldsMoreThanPlanned": ("weights_that and 2-clip", "taken and planned"),
    "ForgetsThePast": ("as_exact and 1-long", "declared bitwise"),
    "DropsContext": ("as_exact and 2-long", "declares bitwise and its blocks are approximate"),
    "PromisesTooMuch": ("as_exact and 2-long", "declared bitwise, reached"),
    "KeepsMoreAlive": ("holds_as_much and 1-alive", "bytes alive"),
    "ExtraBroadcast": ("collectives and 2-clip", "call other collectives"),
    "RefusesInItsOwnWords": ("plans_are_whole", "ValueError: too many"),
    "RefusesWithoutHelp": ("plans_are_whole", "says what, why and what would work"),
    "IdleRanks": ("more_ranks_than", "have nothing to do"),
    "PlansWithTorch": ("imports_no_torch", "planning imports ['torch'"),
    "WaitsForNobody": ("as_exact and 2-image-decode", "computed next to nothing"),
    "HidesItsFailure": ("raises_stops_all and root-encode", "computed next to nothing"),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_strategy_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    selected, words = BROKEN[name]
    if selected in WAITING:
        monkeypatch.setattr(kit_ranks, "STILL_SECONDS", 4.0)
    ranks = "3" if selected == "plans_are_whole" else "2"
    outcomes = run_kit(f"broken_strategies:{name}", "--max-ranks", ranks, "-k", selected)
    assert any(words in text for text in outcomes.failed.values()), outcomes.failed


def test_what_is_changed_is_all_that_is_broken() -> None:
    outcomes = run_kit("broken_strategies:Broken", "--max-ranks", "2", "-k", "clip and not two")
    assert outcomes.failed == {}


def test_settings_reach_the_strategy() -> None:
    outcomes = run_kit(
        "cosmos3_plugins.layer_pipeline:LayerPipeline", "--setting", "op_seconds=none.json", "-k", "several_ranks"
    )
    assert all("none.json" in text for text in outcomes.failed.values()) and outcomes.failed


@pytest.mark.parametrize(
    ("spec", "settings", "says"),
    [
        (None, [], "--strategy=None; the kit tests one strategy"),
        ("replicated", [], "give --strategy package:Class"),
        ("a:B", ["x"], "give --setting x=VALUE"),
    ],
    ids=["no strategy", "no class", "no value"],
)
def test_a_command_that_names_no_strategy(spec: str | None, settings: list[str], says: str) -> None:
    with pytest.raises(SubjectError, match=re.escape(says)):
        Subject.parse(spec, settings)


@pytest.mark.thorough
def test_the_command_says_what_it_needs(tmp_path: Path) -> None:
    """As a plugin's author types it, in a folder of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "--pyargs", "cosmos3_pipeline.plugin_kit"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode != 0
    assert "give --strategy package:Class" in done.stdout + done.stderr


def test_some_clip_of_the_kit_makes_frames_in_pairs_and_some_does_not() -> None:
    def makes_pairs(case: Case) -> bool:
        program = case.program("decode")
        makes = False
        for number, op in enumerate(program.ops):
            if isinstance(op, Conv) and case.dtype == "float32" and case.batch == 1 and case.chunks() > 1:
                _, frames, rows, cols, outputs = op.target.shape(case.shape, first=False)
                frames //= program.portions_at(number + 1, first=False)
                makes |= makes_frame_pairs(op.source.channels, outputs, op.kernel, frames, rows * cols)
        return makes

    assert [case.name for case in CASES if makes_pairs(case)] == ["tall"]
