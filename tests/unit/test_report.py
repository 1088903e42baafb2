"""The page of a sweep: nothing of it is elsewhere, and no words of a prompt are obeyed by a browser."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from sweep_folders import leave_run

from cosmos3_pipeline import report
from cosmos3_pipeline.errors import ConfigError, Problem
from cosmos3_pipeline.jobs import sweep
from cosmos3_pipeline.report.command import main
from cosmos3_pipeline.report.plots import ticks

HOSTILE = "</script><script>alert(1)</script>"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep of four jobs, of which one failed and one was refused."""
    monkeypatch.setattr(sweep, "current", None)
    started = sweep.start(tmp_path, baseline=0)
    for number, level in ((0, 100), (1, 110)):
        leave_run(tmp_path / str(number), level, str(level), seconds=2.0 + number)
        (tmp_path / str(number) / "config.yaml").write_text(f"sampler: {{seed: {number}}}\nvae: {{x: 1}}\n")
        given = [f"sampler.seed={number}", f"task.prompt={HOSTILE if number else 'a kite'}"]
        sweep.record(tmp_path, number, given, tmp_path / str(number), "generate", None)
    sweep.record(tmp_path, 2, ["sampler.seed=2"], tmp_path / "2", "generate", RuntimeError("the disk is full"))
    problem = Problem("sampler.seed=-1", "seeds count from 0", "sampler.seed=0")
    sweep.record(tmp_path, 3, ["sampler.seed=-1"], tmp_path / "3", "generate", ConfigError([problem]))
    started.report()
    return tmp_path


def page_of(folder: Path) -> str:
    return report.sweep_page(folder).read_text(encoding="utf-8")


def test_a_page_needs_no_network_and_no_other_file(folder: Path) -> None:
    page = page_of(folder)
    links = re.findall(r"""(?:src|href|url\()=?["'(]?([^"' )>]+)""", page)
    assert {link for link in links if not link.startswith(("data:", "#"))} == {"jobs.csv"}
    assert "https:" not in page.replace("http://www.w3.org", "")
    assert page.count("data:image/png;base64,") == 2


def test_what_was_refused_and_what_failed_is_told(folder: Path) -> None:
    page = page_of(folder)
    assert "job 3 refused: sampler.seed=-1" in page and "works: sampler.seed=0" in page
    assert "<p>why: seeds count from 0" in page  # the summary has said what is wrong
    assert "job 2 failed: RuntimeError: the disk is full" in page


def test_jobs_with_one_reason_are_told_once(folder: Path) -> None:
    found = json.loads((folder / "sweep.json").read_text())
    found["jobs"].append({**found["jobs"][3], "job": 4, "overrides": ["sampler.seed=-1", "task.fps=8"]})
    (folder / "sweep.json").write_text(json.dumps(found))
    page = page_of(folder)
    assert "job 3, 4 refused: sampler.seed=-1" in page and page.count("why: seeds count from 0") == 1
    assert page.count(">refused</td>") == 2


def test_only_jobs_without_repeats_have_times_of_one_run(folder: Path) -> None:
    assert "of one run each" in page_of(folder)
    found = json.loads((folder / "sweep.json").read_text())
    found["jobs"].append({**found["jobs"][0], "job": 4})
    (folder / "sweep.json").write_text(json.dumps(found))
    assert "of one run each" not in page_of(folder)


@pytest.mark.parametrize(
    ("highest", "labels"),
    [(0, [0]), (0.004, [0, 0.001, 0.002, 0.003, 0.004]), (7.14, [0, 2, 4, 6, 8]), (93, [0, 20, 40, 60, 80, 100])],
)
def test_the_labels_of_an_axis_are_even(highest: float, labels: list[float]) -> None:
    assert ticks(highest) == labels


def test_words_of_a_prompt_stay_words(folder: Path) -> None:
    page = page_of(folder)
    assert HOSTILE not in page and "&lt;/script&gt;&lt;script&gt;alert(1)" in page
    told = json.loads(re.search(r'id="diffs">(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    assert set(told) == {"0-1", "1-0"} and "sampler.seed: 0 -> 1" in told["0-1"]


def test_the_table_is_there_as_csv(folder: Path) -> None:
    page_of(folder)
    rows = list(csv.DictReader((folder / "jobs.csv").open()))
    assert [row["status"] for row in rows] == ["done", "done", "failed", "refused"]
    assert rows[1]["total_seconds"] == "3.0" and rows[1]["seconds.denoise"] == "2.25"
    assert rows[1]["planned.memory.peak_bytes"] == "6" and rows[1]["likeness.kind"] == "differs"


def test_large_pictures_stay_beside_the_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "EMBEDDED_BYTES", 10)
    assert 'src="0/image.png"' in page_of(folder)


LOW, HIGH = {"kind": "differs", "psnr_db": 20.0}, {"kind": "differs", "psnr_db": 50.0}
SAME, IN_THE_FILE = {"kind": "identical"}, {"kind": "differs", "psnr_db": None}


@pytest.mark.parametrize(
    ("likenesses", "shown", "first"),
    [
        ([SAME, HIGH, {"kind": "reference"}, LOW], [0, 1, 2, 3], (2, 3, False)),
        ([SAME, HIGH, {"kind": "reference"}, LOW], [0, 1, 2], (2, 1, False)),
        ([SAME, IN_THE_FILE, {"kind": "reference"}], [0, 1, 2], (2, 0, True)),
        ([{"kind": "other size"}, SAME, {"kind": "reference"}], [0, 1, 2], (2, 0, False)),
        ([None, None, None], [0, 1], (0, 1, False)),  # the baseline failed
        ([SAME, HIGH, {"kind": "reference"}], [2], (2, 2, False)),
    ],
    ids=["the farthest", "with a picture", "all equal", "another size", "no reference", "one picture"],
)
def test_the_difference_begins_with_the_job_that_differs_most(
    likenesses: list[dict[str, object] | None], shown: list[int], first: tuple[int, int, bool]
) -> None:
    jobs = [{"job": number, "likeness": one} for number, one in enumerate(likenesses)]
    assert report.first_pair(jobs, shown, baseline=2) == first


def test_the_page_selects_the_first_pair_and_says_if_all_are_equal(folder: Path) -> None:
    page = page_of(folder)
    for pick, job in (("one", "0"), ("other", "1")):
        listed = page.partition(f'<select id="{pick}">')[2].partition("</select>")[0]
        assert re.findall('value="(.)" selected', listed) == [job]
    assert "pictures of all jobs are equal" not in page
    found = json.loads((folder / "sweep.json").read_text())
    for job in found["jobs"]:
        job |= {"likeness": {"kind": "identical"}} if job["job"] == 1 else {}
    (folder / "sweep.json").write_text(json.dumps(found))
    assert "pictures of all jobs are equal" in page_of(folder)


def test_many_jobs_are_compared_with_the_baseline_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PAIRS", 1)
    leave_run(folder / "4", 3, "c")
    (folder / "4" / "config.yaml").write_text("sampler: {seed: 4}\nvae: {x: 1}\n")
    content: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    row = {**content["jobs"][1], "job": 4, "folder": str(folder / "4")}
    found = report.diffs([*content["jobs"], row], 0)
    assert set(found) == {"0-1", "1-0", "0-4", "4-0"}


def test_the_command_writes_the_page_of_a_sweep_a_run_and_a_prompt_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (folder, folder / "0"):
        assert main([str(place)]) == 0
        assert capsys.readouterr().out.strip() == str(place / "index.html")
    lines = [{"folder": name, "prompt": name, "failed": None} for name in ("0", "1")]
    (folder / "prompts.json").write_text(json.dumps({"lines": lines}))
    (folder / "sweep.json").unlink()
    (folder / "metrics.json").write_text("{}")
    assert main([str(folder)]) == 0
    assert "0: task.prompt=0" in (folder / "index.html").read_text()
    assert main([str(folder / "2")]) == 3
