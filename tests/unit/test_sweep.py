"""The table of a sweep: what Hydra ran, whatever lies in the jobs' folders."""

from __future__ import annotations

import json
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from omegaconf import OmegaConf
from rich.console import Console
from sweep_folders import leave_run

from cosmos3_pipeline.cli import let_a_grid_end_with_a_refusal
from cosmos3_pipeline.config.compose import compose
from cosmos3_pipeline.distributed.board import PeerFailed, PeerLost
from cosmos3_pipeline.distributed.failure import RankFailed
from cosmos3_pipeline.errors import ConfigError, Problem, Refusal
from cosmos3_pipeline.jobs import sweep
from cosmos3_pipeline.jobs.objective import check_objective, objective_of
from cosmos3_pipeline.jobs.origin import Origin, origin_of
from cosmos3_pipeline.jobs.start import prepare
from cosmos3_pipeline.jobs.sweep import table
from cosmos3_pipeline.jobs.sweep.outcome import Outcome, outcomes
from cosmos3_pipeline.stages.media import likeness_of_files

PROBLEM = Problem("task.num_frames=8 is not 4k + 1", "the first latent frame is one frame", "task.num_frames=9")


@pytest.fixture(autouse=True)
def no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "current", None)
    monkeypatch.setenv("COLUMNS", "200")


def row_of(folder: Path, number: int) -> dict[str, Any]:
    content = json.loads((folder / "sweep.json").read_text())
    return next(row for row in content["jobs"] if row["job"] == number)


def test_a_grid_of_optuna_ends_where_its_last_trial_failed() -> None:
    let_a_grid_end_with_a_refusal()
    study = optuna.create_study(sampler=optuna.samplers.GridSampler({"ranks": [1]}))
    trial = study.ask()
    trial.suggest_categorical("ranks", [1])
    study.tell(trial, state=optuna.trial.TrialState.FAIL)
    assert [trial.state.name for trial in study.trials] == ["FAIL"]


def test_rows_are_those_of_this_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave_run(tmp_path / "0", 100, "a")
    leave_run(tmp_path / "1", 110, "b")  # of an older sweep: now this job fails
    leave_run(tmp_path / "7", 100, "a")  # of an older sweep with more jobs
    sweep.record(tmp_path, 7, ["a=7"], tmp_path / "7", "generate", None)
    started = sweep.start(tmp_path, baseline=0)
    started.look_ahead([])
    sweep.record(tmp_path, 0, ["a=0", "c=1"], tmp_path / "0", "generate", None)
    sweep.record(tmp_path, 1, ["a=1", "c=1"], tmp_path / "1", "generate", RankFailed(1, 2, "Traceback\nE: no"))
    sweep.record(tmp_path, 2, ["a=2", "c=1"], tmp_path / "2", "generate", ConfigError([PROBLEM]))
    assert started.report()
    rows = json.loads((tmp_path / "sweep.json").read_text())["jobs"]
    assert [(row["job"], row["status"]) for row in rows] == [(0, "done"), (1, "failed"), (2, "refused")]
    assert "seconds" not in rows[1] and "likeness" not in rows[1]
    assert rows[2]["problems"][0]["works"] == "task.num_frames=9"
    assert (rows[0]["total_seconds"], rows[0]["sent_bytes"], rows[0]["peak_bytes"]) == (2.0, 30, 7)
    shown = capsys.readouterr()
    assert "job 2 refused: task.num_frames=8 is not 4k + 1" in shown.out
    assert "job 1 failed: rank 1 of 2: E: no" in shown.out
    assert "c=1" not in shown.out and "reference" in shown.out and "text s" not in shown.out


def test_pictures_are_held_against_the_baseline(tmp_path: Path) -> None:
    levels = {0: (100, "a", 16), 1: (110, "b", 16), 2: (110, "b", 16), 3: (110, "c", 16), 4: (90, "d", 32)}
    for number, (level, digest, size) in levels.items():
        leave_run(tmp_path / str(number), level, digest, size=size)
    started = sweep.start(tmp_path, baseline=1)
    for number in levels:
        sweep.record(tmp_path, number, [f"a={number}"], tmp_path / str(number), "generate", None)
    assert not started.report()
    kinds = {number: row_of(tmp_path, number)["likeness"] for number in levels}
    assert kinds[1] == {"kind": "reference"} and kinds[2] == {"kind": "identical"}
    assert kinds[0]["psnr_db"] == pytest.approx(20 * np.log10(255 / 10))
    # Frames may differ by less than a file shows; "Infinity" would be no JSON.
    assert kinds[3] == {"kind": "differs", "psnr_db": None, "ssim": pytest.approx(1.0)}
    assert kinds[4] == {"kind": "other size"}


def test_a_job_of_whose_end_nothing_is_known_is_in_the_table(tmp_path: Path) -> None:
    started = sweep.start(tmp_path, baseline=0)
    started.look_ahead([(["job=plan", "task.num_frames=9"], compose(["job=plan", "task.num_frames=9"]))])
    assert started.report()
    row = row_of(tmp_path, 0)
    assert row["status"] == table.BROKEN_OFF and row["planned"]["vision_tokens"] > 0


@pytest.mark.long
def test_refused_jobs_are_told_once_and_before_any_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = sweep.start(tmp_path, baseline=0)
    jobs = [[f"task.num_frames={n}", f"sampler.seed={s}", "job=plan"] for n in (8, 9) for s in (0, 1)]
    started.look_ahead([(job, compose(job)) for job in jobs])
    told = capsys.readouterr().err
    assert "2 of 4 jobs will be refused: 0, 1" in told and told.count("is not 4k + 1") == 1
    sweep.record(tmp_path, 0, jobs[0], tmp_path / "0", "plan", ConfigError([PROBLEM]))
    assert capsys.readouterr().err == "job 0 is refused, as said before; the sweep goes on\n"


def test_a_plan_and_a_prompt_file_have_rows(tmp_path: Path) -> None:
    leave_run(tmp_path / "0" / "line_0001", 1, "a", seconds=2.0)
    leave_run(tmp_path / "0" / "line_0002", 1, "b", seconds=3.0)
    lines = [{"folder": "line_0001"}, {"folder": "line_0002"}]
    (tmp_path / "0" / "prompts.json").write_text(json.dumps({"lines": lines}))
    (tmp_path / "0" / "plan.json").write_text((tmp_path / "0" / "line_0001" / "plan.json").read_text())
    leave_run(tmp_path / "1", 1, "a")
    started = sweep.start(tmp_path, baseline=0)
    sweep.record(tmp_path, 0, ["a=0"], tmp_path / "0", "generate", None)
    sweep.record(tmp_path, 1, ["a=1"], tmp_path / "1", "plan", 3.5)
    assert not started.report()
    clips, plan = row_of(tmp_path, 0), row_of(tmp_path, 1)
    assert (clips["clips"], clips["total_seconds"], clips["seconds"]["denoise"]) == (2, 5.0, 3.75)
    assert (plan["total_seconds"], plan["peak_bytes"], plan["objective"]) == (1.5, 6, 3.5)


def test_only_what_varies_is_a_column() -> None:
    jobs = [{"overrides": o} for o in (["a=1", "b=2", "+x=3"], ["a=1", "b=3"], ["~c", "a=1", "b=3"])]
    assert table.varied(jobs) == ["b", "x", "~c"]


def a_run(number: int) -> dict[str, Any]:
    planned = {"seconds.total": 61.02, "memory.peak_bytes": 12_200_000, "exactness.decode": "bitwise"}
    seconds = {"text": 5.25, "denoise": 40.5, "decode": 11.08, "export": 4.01}
    likeness = {"kind": "differs", "psnr_db": 15.89, "ssim": 0.6808} if number else {"kind": "reference"}
    return {
        **{"job": number, "overrides": [f"sampler.steps={number}", f"vae={'parallel' * 3}"], "kind": "generate"},
        **{"status": "done", "objective": None, "planned": planned, "total_seconds": 60.84, "seconds": seconds},
        **{"beyond_bytes": 70_700_000, "sent_bytes": 123_000_000, "likeness": likeness},
    }


@pytest.mark.parametrize("width", [*range(50, 190, 10)])
def test_a_narrow_table_leaves_columns_out_and_breaks_no_word(width: int) -> None:
    jobs = [a_run(number) for number in range(3)]
    made, left_out = table.table(jobs, width)
    console = Console(width=width)
    with console.capture() as captured:
        console.print(made)
    lines = captured.get().splitlines()
    assert all(len(line) <= width for line in lines)
    columns = table.columns(jobs)
    assert set(left_out) <= {column.name for column in columns} and "total s" not in left_out
    for column in columns:
        for job in jobs if column.name not in left_out else ():
            assert f" {column.text(job)} " in next(line for line in lines if f"│ {job['job']:>3} " in line)
    assert (not left_out) == (width >= 150)


@pytest.mark.parametrize(
    "error",
    [
        ConfigError([PROBLEM, PROBLEM]),
        RankFailed(3, 4, "Traceback\nValueError: x"),
        Refusal(what="a", why="b", works="c"),
        PeerFailed(2, "it raised"),
        PeerLost(what="a", why="b", works="c"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_survives_the_way_from_another_process(error: Exception, tmp_path: Path) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error) and copy.__dict__ == error.__dict__
    sweep.record(tmp_path, 0, [], tmp_path, "generate", copy)
    assert str(error) in str(outcomes(tmp_path)[0].error)


def test_a_composition_survives_the_way_to_another_process() -> None:
    composed = compose(["vae=parallel_decode", "topology=cpu_x2"]).cfg
    copy = pickle.loads(pickle.dumps(composed))
    assert OmegaConf.to_yaml(copy) == OmegaConf.to_yaml(composed)


def config_of(*overrides: str) -> Any:
    return prepare(compose(["job=plan", *overrides])).config


def test_a_job_returns_what_is_asked_of_it(tmp_path: Path) -> None:
    leave_run(tmp_path, 1, "a", seconds=4.0)
    assert objective_of(config_of(), tmp_path) is None
    assert objective_of(config_of("objective=seconds"), tmp_path) == 1.5
    measured = prepare(
        compose(["objective=[seconds.decode,psnr,sent_bytes]", "output.against_replicated=true"])
    ).config
    assert objective_of(measured, tmp_path) == (1.0, 100.0, 30.0)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["objective=second"], "did you mean seconds?"),
        (["objective=[seconds,psrn]"], "did you mean psnr?"),
        (["objective=psnr"], "output.against_replicated=true"),
        (["objective=seconds", "plan.search=true"], "objective=null"),
        (["objective=5"], "seconds.decode"),
    ],
)
def test_an_objective_that_the_job_cannot_have_is_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config_of(*overrides)


def test_a_plan_that_does_not_fit_is_no_result(tmp_path: Path) -> None:
    leave_run(tmp_path, 1, "a")
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["summary"]["fits"] = False
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(Refusal, match="does not fit"):
        objective_of(config_of("objective=seconds"), tmp_path)


def test_the_clips_of_a_prompt_file_have_no_likeness_in_common() -> None:
    asked = ["output.against_replicated=true", "objective=[seconds,ssim]", "task.prompt_file=p.txt"]
    (problem,) = check_objective(compose(asked).typed())
    assert "task.prompt_file=p.txt" in problem.what


def test_a_stage_that_is_not_planned_has_no_seconds(tmp_path: Path) -> None:
    leave_run(tmp_path, 1, "a")
    with pytest.raises(Refusal, match="without encode"):
        objective_of(config_of("objective=seconds.encode"), tmp_path)


def test_what_a_job_raised_is_not_told_again_when_the_sweep_ends(tmp_path: Path) -> None:
    sweep.start(tmp_path, baseline=0)
    errors = []
    for _ in range(2):  # as Hydra raises it again, from another place
        try:
            raise errors[0] if errors else RuntimeError("the disk is full")
        except RuntimeError as error:
            errors.append(error)
            if len(errors) == 1:
                sweep.record(tmp_path, 0, [], tmp_path, "generate", error)
    assert sweep.was_told(errors[1]) and not sweep.was_told(RuntimeError("something else"))


def test_equal_files_have_no_psnr(tmp_path: Path) -> None:
    leave_run(tmp_path, 5, "a")
    found = likeness_of_files(tmp_path / "image.png", tmp_path / "image.png")
    assert found is not None and found.psnr_db is None


def test_a_run_says_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, cwd=tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["/bin/cosmos3"])
    assert origin_of(["task.prompt=it's"]) == Origin("""cosmos3 'task.prompt=it'"'"'s'""", None, None)
    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "a")
    clean = origin_of([])
    assert clean.command == "cosmos3" and len(clean.commit or "") == 40 and clean.dirty is False
    (tmp_path / "b").write_text("1")
    assert origin_of([]) == clean
    (tmp_path / "a").write_text("2")
    assert origin_of([]).dirty is True


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            str(RankFailed(1, 2, "photo.jpg is no picture\n  why:   it is text")),
            "rank 1 of 2: photo.jpg is no picture",
        ),
        (
            str(RankFailed(0, 2, "Traceback (most recent call last):\n  in f\nValueError: no")),
            "rank 0 of 2: ValueError: no",
        ),
        ("Traceback (most recent call last):\n  in f\nKeyError: 3", "KeyError: 3"),
        ("", None),
    ],
)
def test_the_reason_of_a_failed_job_is_a_line_that_says_why(error: str, reason: str | None) -> None:
    assert Outcome(0, [], "0", "generate", "failed", [], error).reason == reason
