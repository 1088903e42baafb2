"""Comparing surveys: one change told once, renames told from removals, pixels judged, worst first, exit codes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cosmos3_pipeline.review import render
from cosmos3_pipeline.review.compare import Side, Trace, compare
from cosmos3_pipeline.review.files import FileChanges
from cosmos3_pipeline.review.report import Change, Report
from cosmos3_pipeline.review.runs import measured

CONFIG: dict[str, Any] = {
    "model.name": "nano",
    "output.crf": 17,
    "sampler.seed": 0,
    "stages.denoise.steps": 35,
    "sampler.steps": 35,
    "topology.cfg": 2,
    "topology.ulysses": 2,
    "vae.parallel_decode": True,
}
PLAN: dict[str, Any] = {
    "layout": "cfg 2 x ulysses 2",
    "fits": True,
    "memory.peak_bytes": 30_000_000_000,
    "seconds.total": 60.0,
    "exactness.denoise": "bitwise",
    "exactness.decode": "bitwise",
}
# Values that are written under another key than their own, with that key.
ROOTS = {"stages.denoise.steps": "sampler.steps"}


def case(config: dict[str, Any] | None = None, plan: dict[str, Any] | None = None, **drop: Any) -> dict[str, Any]:
    values = {**CONFIG, **(config or {})}
    return {"overrides": [], "config": {k: v for k, v in values.items() if k not in drop.get("without", ())},
            "plan": {**PLAN, **(plan or {})}}  # fmt: skip


def refused(what: str) -> dict[str, Any]:
    return {"overrides": [], "problems": [{"what": what, "why": "because", "works": "this"}]}


def trace(wanted: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[dict[str, tuple[str, str]]]:
    return [{key: ("conf/a.yaml", ROOTS.get(key, key)) for key in keys} for _, keys in wanted]


def compared(base: dict[str, Any], head: dict[str, Any], files: FileChanges | None = None) -> Report:
    return compare(Side("base", base, trace), Side("head", head, trace), files=files)


def test_equal_surveys_say_so() -> None:
    report = compared({"a": case(), "b": case()}, {"a": case(), "b": case()})
    assert not report.differs
    assert report.exit_code(None) == 0
    assert render.as_text(report).splitlines()[1] == "Nothing changes in 2 cases."


def test_the_same_change_in_many_cases_is_told_once_with_what_follows_it() -> None:
    moved = {"sampler.steps": 40, "stages.denoise.steps": 40}
    base = {name: case() for name in "abc"}
    head = {name: case(moved, {"seconds.total": 60.0 + i}) for i, name in enumerate("abc", 1)}
    report = compared(base, head)
    (change,) = report.changes
    assert (change.key, change.old, change.new) == ("sampler.steps", 35, 40)
    assert change.follows == ("stages.denoise.steps",)
    assert change.cases == ("a", "b", "c")
    assert change.places == (("conf/a.yaml",), ("conf/a.yaml",))
    (effect,) = report.effects
    assert list(effect.cases) == ["a", "b", "c"]
    assert effect.pixels == "another picture (sampler.steps)"
    for words in ("+1.7% to +5.0%", "sampler.steps", "conf/a.yaml", "60 s -> 63 s (+5.0%)"):
        assert words in render.as_text(report)
        assert words in render.as_markdown(report)


def test_a_small_difference_is_not_written_as_none() -> None:
    report = compared({"a": case()}, {"a": case({"sampler.steps": 36}, {"seconds.total": 60.001})})
    assert "60 s -> 60 s (+<0.1%)" in render.as_text(report)


def test_what_stopped_composing_comes_first() -> None:
    report = compared({"a": case(), "b": case()}, {"a": case({"output.crf": 20}), "b": refused("height=100")})
    assert report.exit_code(None) == report.exit_code("invalid") == 2
    (broken,) = report.broken
    assert broken.case == "b" and broken.problems[0]["what"] == "height=100"
    for text in (render.as_text(report), render.as_markdown(report)):
        assert text.index("height=100") < text.index("[1]")
    mended = compared({"b": refused("x")}, {"b": case()})
    assert mended.mended == ("b",) and mended.exit_code(None) == 1
    both = compared({"b": refused("x"), "a": case()}, {"b": refused("y"), "a": case()})
    assert both.refused_in_both == ("b",) and both.exit_code(None) == 0


def test_a_renamed_key_is_no_difference_and_an_edit_on_top_of_it_is_one() -> None:
    renamed = case({"topology.sequence": 2}, without=("topology.ulysses",))
    report = compared({"a": case()}, {"a": renamed})
    (change,) = report.changes
    assert (change.key, change.was, change.cases) == ("topology.sequence", "topology.ulysses", ())
    assert not report.effects
    edited = case({"topology.sequence": 4}, {"layout": "cfg 2 x ulysses 4"}, without=("topology.ulysses",))
    report = compared({"a": case(), "b": case()}, {"a": renamed, "b": edited})
    (change,) = report.changes
    assert (change.key, change.was, change.old, change.new) == ("topology.sequence", "topology.ulysses", 2, 4)
    assert change.cases == ("b",)


def test_a_renamed_node_keeps_its_keys() -> None:
    head = case({"solver.steps": 40, "solver.seed": 0}, without=("sampler.steps", "sampler.seed"))
    report = compared({"a": case()}, {"a": head})
    told = {(c.key, c.was): (c.old, c.new) for c in report.changes if c.cases}
    assert told == {("solver.steps", "sampler.steps"): (35, 40)}
    assert {c.was for c in report.changes} == {"sampler.steps", "sampler.seed"}


def test_unrelated_keys_are_a_removal_and_an_addition() -> None:
    head = case({"task.fps": 24}, without=("output.crf",))
    told = {c.key: (str(c.old), str(c.new)) for c in compared({"a": case()}, {"a": head}).changes}
    assert told == {"task.fps": ("not there", "24"), "output.crf": ("17", "not there")}


def test_a_renamed_option_is_compared_under_its_new_name_and_its_old_one_is_gone() -> None:
    own = {"topology.cfg": 1, "topology.ulysses": 8}
    base = {"default": case(), "topology=h200_x4": case(own)}
    head = {"default": case(), "topology=h200x4": case({**own, "vae.parallel_decode": False})}
    files = FileChanges(renamed={"topology=h200_x4": "topology=h200x4"})
    report = compared(base, head, files)
    (broken,) = report.broken
    assert (broken.case, broken.now_called) == ("topology=h200_x4", "topology=h200x4")
    text = render.as_text(report)
    assert "Renamed: topology=h200_x4 -> topology=h200x4." in text.splitlines()[1]
    assert "command lines and downstream files that say topology=h200_x4 are refused" in text
    (change,) = report.changes
    assert change.key == "vae.parallel_decode"
    assert change.cases == ("topology=h200x4 (was topology=h200_x4)",)
    assert not report.added
    assert compared({"default": case()}, {"default": case(), "topology=new": case(own)}).added == ("topology=new",)


def test_cases_that_a_rename_stops_have_it_as_their_cause() -> None:
    gone = {
        "overrides": [],
        "problems": [{"what": "task=t2i does not exist", "why": "x names it", "works": "t2v"}],
    }
    chosen = {"overrides": ["task=t2i"], "problems": [{"what": "task is a node", "why": "", "works": ""}]}
    base = {"task=t2i": case(), "inherits": case(), "chooses": {**case(), "overrides": ["task=t2i"]}}
    head = {"task=image": case(), "inherits": gone, "chooses": chosen}
    report = compared(base, head, FileChanges(renamed={"task=t2i": "task=image"}))
    ((problems, stopped),) = report.causes
    assert problems[0]["what"] == "task=t2i is renamed: task=image now"
    assert {broken.case for broken in stopped} == set(base)


def test_what_changed_is_told_of_a_case_that_is_refused_on_both_sides() -> None:
    sides = [{"a": {**refused("task.image is not set"), "values": {"task.fps": fps}}} for fps in (5, 10)]
    report = compared(*sides)
    (change,) = report.changes
    assert (change.key, change.old, change.new, change.cases) == ("task.fps", 5, 10, ("a",))
    assert report.refused_in_both == ("a",) and not report.effects and report.exit_code(None) == 1


def test_hydras_own_settings_are_changes_without_a_case() -> None:
    own = Change(0, "hydra.run.dir", "", "a", "b", (("conf/c.yaml",), ("conf/c.yaml",)), (), (), "every run")
    files = FileChanges(hydra=(own,), new=("hydra/launcher=mine",), abouts={"hydra/launcher=mine": "Choose mine."})
    report = compared({"a": case()}, {"a": case({"output.crf": 18})}, files)
    assert [change.number for change in report.changes] == [1, 2] and report.exit_code("plan") == 0
    for text in (render.as_text(report), render.as_markdown(report)):
        assert "Hydra's own settings change: hydra.run.dir." in text and "every run" in text
        assert "Choose mine." in text and "renamed" not in text


@pytest.mark.parametrize(
    ("config", "plan", "says"),
    [
        pytest.param({"topology.cfg": 1}, {"layout": "cfg 1 x ulysses 2"}, "same pixels", id="bitwise layouts"),
        pytest.param(
            {"topology.threads_per_rank": 1}, {}, "equal up to rounding (another number of threads)", id="threads"
        ),
        pytest.param({"sampler.seed": 1}, {}, "another picture (sampler.seed)", id="seed"),
        pytest.param({"output.crf": 20}, {}, "same frames, compressed differently", id="codec"),
        pytest.param(
            {"topology.ulysses": 4},
            {"layout": "cfg 2 x ulysses 4", "exactness.denoise": "rounding"},
            "equal up to rounding (denoise is rounding)",
            id="rounding",
        ),
        pytest.param(
            {"vae.decode._target_": "tiled"},
            {"exactness.decode": "approximate"},
            "another picture, close to the eye (decode is approximate)",
            id="approximate",
        ),
    ],
)
def test_pixels_are_judged(config: dict[str, Any], plan: dict[str, Any], says: str) -> None:
    report = compared({"a": case()}, {"a": case(config, plan)})
    told = report.effects[0].pixels if report.effects else "same pixels"
    assert told == says


def test_going_back_from_approximate_is_another_picture_too() -> None:
    loose = {"exactness.decode": "approximate"}
    report = compared({"a": case({"vae.parallel_decode": False}, loose)}, {"a": case()})
    assert "was approximate" in report.effects[0].pixels
    rounding = {"exactness.denoise": "rounding", "layout": "cfg 2 x ulysses 2"}
    other = {"exactness.denoise": "rounding", "layout": "cfg 2 x ulysses 4"}
    report = compared({"a": case({}, rounding)}, {"a": case({"topology.ulysses": 4}, other)})
    assert report.effects[0].pixels == "equal up to rounding (denoise is rounding)"


def test_cases_that_are_judged_alike_are_told_together() -> None:
    sound = {"seconds.total": 61.0, "seconds.sound": 1.0, "exactness.sound": "bitwise"}
    plans = {"a": sound, "b": sound, "c": {**sound, "seconds.sound": 3.0, "memory.sound_bytes": 10}}
    plans["d"] = {"seconds.total": 50.0}
    head = {name: case({"task.sound": True}, plan) for name, plan in plans.items()}
    report = compared({name: case() for name in head}, head)
    assert [list(effect.cases) for effect in report.effects] == [["a", "b", "c"], ["d"]]
    text = render.as_text(report)
    assert "3 slower, 1 faster" in text
    assert "seconds.sound: - -> 1 s to 3 s" in text and "10 B (in 1 of the 3 cases)" in text
    assert text.count("a, b, c: seconds 60 s -> 61 s (+1.7%)") == 1


def test_the_worst_consequence_comes_first() -> None:
    base = {name: case() for name in ("slow", "big", "full", "loose")}
    head = {
        "slow": case({"topology.cfg": 1}, {"seconds.total": 80.0}),
        "big": case({"vae.parallel_decode": False}, {"memory.peak_bytes": 60_000_000_000}),
        "full": case({"model.name": "super"}, {"fits": False, "memory.peak_bytes": 90_000_000_000}),
        "loose": case({"vae.decode._target_": "tiled"}, {"exactness.decode": "approximate"}),
    }
    report = compared(base, head)
    assert [next(iter(e.cases)) for e in report.effects] == ["loose", "full", "big", "slow"]
    assert "1 less exact, 1 no longer fit" in render.headline(report)


@pytest.mark.parametrize(
    ("plan", "fail_on", "code"),
    [
        ({}, None, 1),
        ({}, "plan", 0),
        ({"seconds.total": 61.0}, "plan", 1),
        ({"seconds.total": 61.0}, "exactness", 0),
        ({"exactness.decode": "rounding"}, "exactness", 1),
        ({"exactness.decode": "rounding"}, "invalid", 0),
    ],
)
def test_exit_codes(plan: dict[str, Any], fail_on: str | None, code: int) -> None:
    assert compared({"a": case()}, {"a": case({"output.crf": 20}, plan)}).exit_code(fail_on) == code


def test_a_change_of_the_code_alone_is_told_as_such() -> None:
    report = compared({"a": case()}, {"a": case({}, {"seconds.total": 50.0})})
    assert not report.changes
    assert "the code plans differently" in render.as_text(report)


def test_json_is_stable_and_says_what_is_not_there() -> None:
    head = case({"task.fps": 24}, without=("output.crf",))
    report = compared({"a": case()}, {"a": head})
    plain = json.loads(render.as_json(report))
    assert plain["schema_version"] == 1
    assert {c["key"]: sorted(set(c) & {"old", "new"}) for c in plain["changes"]} == {
        "task.fps": ["new"],
        "output.crf": ["old"],
    }
    assert render.as_json(report) == render.as_json(compared({"a": case()}, {"a": head}))


def test_markdown_folds_what_is_long_and_escapes_what_would_break_the_table() -> None:
    base = {f"case{i}": case() for i in range(20)}
    head = {f"case{i}": case({"model.name": f"a|b{i}"}, {"seconds.total": 70.0 + i}) for i in range(20)}
    page = render.as_markdown(compared(base, head))
    assert page.count("<details>") == page.count("</details>") >= 2
    assert "a\\|b3" in page and "a|b3" not in page.replace("a\\|b3", "")


def test_one_cause_is_told_once_with_all_the_cases_that_it_stopped() -> None:
    names = [f"case{number}" for number in range(9)]
    stopped = refused("task.height cannot be resolved")
    report = compared({name: case() for name in names}, dict.fromkeys(names, stopped))
    text = render.as_text(report)
    assert text.count("cannot be resolved") == 1 and "case0, case1, case2, case3 and 5 more" in text
    assert render.as_markdown(report).count("cannot be resolved") == 1
    assert len(report.as_dict()["broken"]) == 9  # for programs each by itself


def test_the_headline_says_what_changed_and_what_only_the_encoder_does() -> None:
    moved = {"output.crf": 20}
    report = compared({name: case() for name in "ab"}, {name: case(moved) for name in "ab"})
    assert render.headline(report) == (
        "Of 2 cases: 2 with the same frames, compressed differently. Changed: output.crf from 17 to 20."
    )
    apart = compared({name: case() for name in "ab"}, {"a": case(moved), "b": case({"output.crf": 30})})
    assert render.headline(apart).endswith(" Changed: output.crf.")


def test_a_value_that_is_refused_for_several_reasons_is_told_once_with_the_cases_of_each() -> None:
    def with_sound(*others: str) -> dict[str, Any]:
        problems = [
            {
                "what": f"task.sound=true with {o}",
                "why": f"{o} is silent",
                "works": "none",
                "set": "task.sound by a:1",
            }
            for o in others
        ]
        return {"overrides": [], "problems": problems}

    head = {
        "a": with_sound("task=t2i"),
        "b": with_sound("task=policy"),
        "c": with_sound("task=t2i", "model=edge"),
        "d": refused("height=100"),
    }
    report = compared({name: case() for name in head}, head)
    for text in (render.as_text(report), render.as_markdown(report)):
        assert text.count("task.sound=true") == text.count("task.sound by a:1") == 1
        assert "with task=t2i (a, c): task=t2i is silent; works: none" in text
        assert "with task=policy (b):" in text and "with model=edge (c):" in text
        assert text.index("task.sound=true") < text.index("height=100")
    assert "STOPPED COMPOSING  a, b, c\n" in render.as_text(report)


def test_another_strategy_is_one_change_with_its_settings() -> None:
    old = {"vae.decode._target_": "a.A", "vae.decode.rows": 2, "vae.decode.cols": 3}
    new = {"vae.decode._target_": "b.B", "vae.decode.pixels": 9}
    report = compared({"a": case(old)}, {"a": case(new)})
    (change,) = report.changes
    assert change.key == "vae.decode._target_"
    assert change.follows == ("vae.decode.cols", "vae.decode.pixels", "vae.decode.rows")


def test_another_option_of_a_group_is_one_change() -> None:
    def of_option(option: str) -> Trace:
        def where(wanted: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[dict[str, tuple[str, str]]]:
            return [{key: (f"conf/weights/{option}.yaml", key) for key in keys} for _, keys in wanted]

        return where

    old, new = ({"weights.placement": name, "weights.layers": count} for name, count in (("a", 0), ("b", 1)))
    base = Side("base", {"x": case(old), "y": case(old)}, of_option("resident"))
    report = compare(base, Side("head", {"x": case(new), "y": case(new)}, of_option("auto")))
    (change,) = report.changes
    assert (change.key, change.old, change.new) == ("weights", "resident", "auto")
    assert change.follows == ("weights.layers", "weights.placement") and change.cases == ("x", "y")
    # The files of a renamed option are no choice, so each edit in them is told by itself.
    renamed = FileChanges(renamed={"weights=resident": "weights=auto"})
    head = Side("head", {"x": case(new)}, of_option("auto"))
    assert {c.key for c in compare(base, head, files=renamed).changes} == {"weights.layers", "weights.placement"}


def test_a_mistake_in_a_renamed_option_is_told_beside_the_rename() -> None:
    files = FileChanges(renamed={"task=t2i": "task=image"})
    report = compared({"task=t2i": case()}, {"task=image": refused("unknown key task.fsp")}, files)
    assert [b.problems[0]["what"] for b in report.broken] == [
        "task=t2i is renamed: task=image now",
        "unknown key task.fsp",
    ]


def test_a_new_case_says_what_it_does_and_a_rename_whom_it_breaks() -> None:
    new = case({}, {"ranks": 4, "fits": False})
    files = FileChanges(abouts={"topology=new": "Choose it.", "topology=odd": "Choose it not."})
    head = {"default": case(), "topology=new": new, "topology=odd": refused("no prompt")}
    report = compared({"default": case()}, head, files)
    odd = "topology=odd: Choose it not. | refused without more overrides: no prompt"
    assert odd in render.as_text(report) and not report.refused_in_both
    words = "Choose it. | 4 ranks, cfg 2 x ulysses 2, 30 GB per rank, which DOES NOT FIT, about 60 s, bitwise"
    assert f"topology=new: {words}" in render.as_text(report)
    renamed = {**case()["config"], "sampler.start": case()["config"]["sampler.seed"]}
    del renamed["sampler.seed"]
    told = render.as_text(compared({"a": case()}, {"a": {**case(), "config": renamed}}))
    assert "command lines and other files that say sampler.seed are refused from now on" in told


def test_what_two_runs_measured_is_compared(tmp_path: Path) -> None:
    for name, seconds in (("a", 2.0), ("b", 8.0)):
        (tmp_path / name).mkdir()
        stages = {"decode": {"seconds": seconds / 2}}
        report = {"seconds": seconds, "peak_bytes": 10**8, "stages": stages, "frames_sha256": "x"}
        (tmp_path / name / "metrics.json").write_text(json.dumps(report))
    found = measured(tmp_path / "a", tmp_path / "b")
    assert found["seconds.decode"] == (1.0, 4.0) and found["frames_sha256"] == ("x", "x")
    report = replace(compared({"a": case()}, {"a": case()}), measured=found)
    assert report.differs and "seconds: 2 s -> 8 s (4.0x)" in render.as_text(report)
    assert measured(tmp_path / "a", tmp_path / "none") == {}


def test_what_a_model_was_trained_for_is_no_part_of_the_picture() -> None:
    report = compared({"a": case({"model.trained.words": None})}, {"a": case({"model.trained.words": ["red"]})})
    assert report.changes and not report.effects
