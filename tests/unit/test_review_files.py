"""Changes that a review finds in the files alone: renames, new options, and Hydra's own node."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosmos3_pipeline.config.closure import contents
from cosmos3_pipeline.review.files import FileChanges, compared

CONFIG = """
defaults: [{task: t2v}, {weights: resident}, {override hydra/job_logging: none}, _self_]
hydra: {run: {dir: outputs}}
"""
BASE = {
    "config": CONFIG,
    "task/t2v": "# Choose for words.\nname: t2v\nfps: 24\nsound: false\n",
    "task/i2v": "# Choose for a photograph.\ndefaults: [t2v, _self_]\nname: i2v\nkeep: [0]\n",
    "weights/resident": "placement: resident\n",
    "weights/auto": "placement: auto\n",
    "hydra/launcher/slurm": "defaults: [submitit_slurm, _self_]\nnodes: 1\ntimeout_min: 60\n",
}


def told(tmp_path: Path, edits: dict[str, str | None]) -> FileChanges:
    """The differences that `edits` make, each a path with its new text, or None for a file that is deleted."""
    known = []
    for name, files in (("old", BASE), ("new", {**BASE, **edits})):
        for path, text in files.items():
            if text is not None:
                file = tmp_path / name / f"{path}.yaml"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
        known.append(contents(tmp_path / name))
    return compared(known[0], known[1], tmp_path / "new", "kite/conf", "config")


MOVED = {"weights/resident": None, "weights/auto": None, "placement/resident": BASE["weights/resident"]}
MOVED["placement/auto"] = BASE["weights/auto"]


@pytest.mark.parametrize(
    ("edits", "renames"),
    [
        pytest.param(
            {"task/i2v": None, "task/photo": BASE["task/i2v"]}, {"task=i2v": "task=photo"}, id="as it was"
        ),
        pytest.param(
            {"task/i2v": None, "task/photo": BASE["task/i2v"].replace("[0]", "[0, 1]")},
            {"task=i2v": "task=photo"},
            id="with an edit",
        ),
        pytest.param({"task/i2v": None, "task/photo": "name: photo\nfps: 3\n"}, {}, id="another option"),
        pytest.param({"task/i2v": None}, {}, id="deleted"),
        pytest.param(MOVED, {"weights": "placement"}, id="a group"),
        pytest.param(
            {**MOVED, "config": CONFIG.replace("weights:", "placement@weights:")},
            {"weights": "placement@weights"},
            id="a group for the same node",
        ),
        pytest.param(
            {"hydra/launcher/slurm": None, "hydra/launcher/queue": BASE["hydra/launcher/slurm"]},
            {"hydra/launcher=slurm": "hydra/launcher=queue"},
            id="of Hydra",
        ),
    ],
)
def test_renames(tmp_path: Path, edits: dict[str, str | None], renames: dict[str, str]) -> None:
    assert told(tmp_path, edits).renames == renames


def test_files_that_still_say_the_old_name_are_named(tmp_path: Path) -> None:
    problem = told(tmp_path, {"task/t2v": None, "task/words": BASE["task/t2v"]}).problem_of("task=t2v")
    assert problem["works"] == "task=words, also in kite/conf/config.yaml, kite/conf/task/i2v.yaml"
    assert "task=t2v are refused" in problem["why"]
    problem = told(tmp_path / "group", MOVED).problem_of("weights=auto")
    assert problem["works"] == "placement=OPTION, also in kite/conf/config.yaml"


@pytest.mark.parametrize(
    ("edits", "changes"),
    [
        pytest.param(
            {"config": CONFIG.replace("dir: outputs", "dir: out")},
            [("hydra.run.dir", "outputs", "out", "every run")],
            id="a key",
        ),
        pytest.param(
            {"config": CONFIG.replace("job_logging: none", "job_logging: default")},
            [("hydra/job_logging", "none", "default", "every run")],
            id="a choice",
        ),
        pytest.param(
            {"hydra/launcher/slurm": BASE["hydra/launcher/slurm"].replace("60", "90")},
            [("hydra.launcher.timeout_min", 60, 90, "runs with hydra/launcher=slurm")],
            id="an option",
        ),
        pytest.param(
            {"task/i2v": "# @package _global_\nhydra: {job: {chdir: true}}\n"},
            [
                ("@package", "not there", "_global_", "runs with task=i2v"),
                ("hydra.job.chdir", "not there", True, "runs with task=i2v"),
            ],
            id="in another option",
        ),
        pytest.param(
            {"task/i2v": "# @package sampler\n" + BASE["task/i2v"]},
            [("@package", "not there", "sampler", "runs with task=i2v")],
            id="a header",
        ),
        pytest.param({"task/i2v": BASE["task/i2v"] + "fps: 3\n"}, [], id="not Hydra's"),
    ],
)
def test_hydras_own_settings(
    tmp_path: Path, edits: dict[str, str | None], changes: list[tuple[object, ...]]
) -> None:
    found = told(tmp_path, edits).hydra
    assert [(c.key, str(c.old), c.new, c.runs) for c in found] == [(key, str(old), *r) for key, old, *r in changes]


def test_a_new_option_says_when_to_choose_it(tmp_path: Path) -> None:
    new = {"task/loop": "# Choose for a loop.\nname: loop\n", "hydra/launcher/mine": "# Choose for mine.\na: 1\n"}
    found = told(tmp_path, new)
    assert found.abouts == {"task=loop": "Choose for a loop.", "hydra/launcher=mine": "Choose for mine."}
    assert found.new == ("hydra/launcher=mine",)
    assert told(tmp_path / "gone", {"hydra/launcher/slurm": None}).gone == ("hydra/launcher=slurm",)
