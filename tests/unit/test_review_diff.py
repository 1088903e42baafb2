"""`cosmos3 diff` on real git revisions, each composed by its own code; blame and sweep-plan as commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANGS

from cosmos3_pipeline.config.source import BUILTIN
from cosmos3_pipeline.config.sweep import jobs_of
from cosmos3_pipeline.review import blame, command, sweep_plan
from cosmos3_pipeline.review.revisions import git

pytestmark = pytest.mark.ranks

PROJECT = Path(__file__).parents[2]
KEPT = {
    "topology": {"cpu_x1", "h100_x1", "h200_x1", "h200_x4"},
    "task": {"t2v", "t2i"},
    "model": {"nano", "toy"},
    "vae": {"parallel_decode", "replicated"},
    "vae/encode": {"layer_pipeline"},
    "vae/decode": {"layer_pipeline"},
    "weights": {"resident", "streamed"},
}


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "cosmos3_pipeline", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{PROJECT}:{PROJECT / 'plugins'}", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )


def commit(repository: Path, message: str) -> None:
    git(repository, "add", "-A")
    git(repository, "-c", "user.name=n", "-c", "user.email=n@example.org", "commit", "-q", "-m", message)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert re.search(old, text, re.MULTILINE), f"{old} is not in {file}"
    file.write_text(re.sub(old, new, text, flags=re.MULTILINE))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of this project with fewer options, so that a comparison takes seconds."""
    root = tmp_path_factory.mktemp("repository")
    ignore = shutil.ignore_patterns("__pycache__")
    for part in ("conf", "cosmos3_pipeline", "plugins"):
        shutil.copytree(PROJECT / part, root / part, ignore=ignore, symlinks=True)
    shutil.copy(PROJECT / "pyproject.toml", root)
    shutil.rmtree(root / "conf" / "experiment")
    edit(root / "conf" / "config.yaml", r"^  - experiment: null\n", "")
    for group, kept in KEPT.items():
        for file in (root / "conf" / group).glob("*.yaml"):
            if file.stem not in kept:
                file.unlink()
    (root / "tests" / "golden").mkdir(parents=True)
    (root / "tests" / "golden" / "cases.yaml").write_text("nano_h200_x4: [model=nano, topology=h200_x4]\n")
    git(root, "init", "-q", "-b", "main")
    commit(root, "base")
    return root


@pytest.fixture
def repository(pristine: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "repository"
    shutil.copytree(pristine, copy, symlinks=True)
    return copy


@pytest.mark.sampled(1)
def test_edits_on_top_of_renames_in_code_and_in_conf(repository: Path) -> None:
    conf, library = repository / "conf", repository / "cosmos3_pipeline"
    edit(conf / "model" / "nano.yaml", "num_frames: 189, steps: 35", "num_frames: 189, steps: 40")
    commit(repository, "more steps")
    # The later revision renames the guidance scale in schema, code and conf. It also renames a topology's file.
    edit(
        library / "config" / "schema.py",
        r"^class SamplerConfig:\n((?:.*\n)*?)    guidance_scale",
        r"class SamplerConfig:\n\1    scale",
    )
    for file in library.rglob("*.py"):
        text = file.read_text()
        if "sampler.guidance_scale" in text:
            file.write_text(text.replace("sampler.guidance_scale", "sampler.scale"))
    edit(conf / "sampler" / "unipc.yaml", "^guidance_scale: ", "scale: ")
    (conf / "topology" / "h200_x4.yaml").rename(conf / "topology" / "four_h200.yaml")
    edit(repository / "tests" / "golden" / "cases.yaml", "topology=h200_x4", "topology=four_h200")
    edit(conf / "topology" / "four_h200.yaml", r"^cfg: 2\nulysses: 2", "cfg: 1\nulysses: 4")
    edit(conf / "task" / "t2i.yaml", "^num_frames: .*", "num_frames: 2")

    done = run("diff", "HEAD~1", "--format", "json", cwd=repository)
    assert done.returncode == 2, done.stderr
    report = json.loads(done.stdout)
    assert {b["case"]: b["now_called"] for b in report["broken"]} == {
        "task=t2i": "",
        "topology=h200_x4": "topology=four_h200",
    }
    changes = {c["key"]: c for c in report["changes"]}
    assert changes["sampler.scale"]["was"] == "sampler.guidance_scale" and not changes["sampler.scale"]["cases"]
    steps = changes["model.recommended.video.steps"]
    assert (steps["old"], steps["new"]) == (35, 40)
    assert steps["places"] == [["conf/model/nano.yaml"], ["conf/model/nano.yaml"]]
    assert "sampler.steps" in steps["follows"]
    ulysses = changes["topology.ulysses"]
    assert ulysses["places"] == [["conf/topology/h200_x4.yaml"], ["conf/topology/four_h200.yaml"]]
    assert "nano_h200_x4" in ulysses["cases"]
    fields = next(e["cases"]["nano_h200_x4"] for e in report["effects"] if "nano_h200_x4" in e["cases"])
    assert fields["layout"] == ["cfg 2 x ulysses 2", "cfg 1 x ulysses 4"]
    assert fields["seconds.denoise"][1] > fields["seconds.denoise"][0]

    assert str(repository) not in done.stdout
    assert "hydra." not in done.stdout
    assert git(repository, "worktree", "list").count(b"\n") == 1


def test_nothing_changes_between_a_commit_and_its_own_tree(repository: Path) -> None:
    done = run("diff", "--format", "markdown", cwd=repository / "conf")  # from any folder of the project
    assert (done.returncode, done.stderr) == (0, "")
    assert "Nothing changes" in done.stdout and "`HEAD` -> `working tree`" in done.stdout


def test_an_error_in_the_code_of_a_revision_is_told_whole_and_with_its_place(repository: Path) -> None:
    (repository / "cosmos3_pipeline" / "planning" / "__init__.py").write_text(
        "def plan_of(cfg):\n"
        "    if cfg.topology.ulysses > 1:\n"
        '        raise ZeroDivisionError("no paint left\\n\\n   in the  bucket")\n'
        '    return {"summary": {}}\n'
    )
    commit(repository, "a mistake")
    done = run("diff", "HEAD~1..HEAD", "--format", "json", cwd=repository)
    assert done.returncode == 2, done.stderr
    broken = json.loads(done.stdout)["broken"]
    named = {
        case["case"] for case in broken if not case["case"].startswith("weights=")
    }  # planned on four ranks too
    assert named == {"topology=h200_x4", "nano_h200_x4", "model=nano"}
    for case in broken:
        assert case["problems"] == [
            {
                "what": "ZeroDivisionError: no paint left",
                "why": "in the bucket; raised in cosmos3_pipeline/planning/__init__.py, line 3, in plan_of()",
                "works": "",
            }
        ]


@pytest.mark.thorough
def test_an_error_in_a_library_is_placed_where_the_working_tree_called_it(repository: Path) -> None:
    library = repository / ".venv" / "site-packages"
    library.mkdir(parents=True)
    (library / "bucket.py").write_text('def paint():\n    raise ValueError("empty")\n')
    (repository / "cosmos3_pipeline" / "planning" / "__init__.py").write_text(
        "import sys\ndef plan_of(cfg):\n"
        '    sys.path.append(str(__import__("pathlib").Path(__file__).parents[2] / ".venv" / "site-packages"))\n'
        "    import bucket\n    return bucket.paint()\n"
    )
    done = run("diff", "HEAD", "--format", "json", cwd=repository)
    problems = [case["problems"] for case in json.loads(done.stdout)["broken"]]
    assert problems and all(
        problem
        == {
            "what": "ValueError: empty",
            "why": "came up in cosmos3_pipeline/planning/__init__.py, line 5, in plan_of()",
            "works": "",
        }
        for (problem,) in problems
    )


@pytest.mark.thorough
def test_code_that_does_not_start_is_an_error_of_the_comparison(repository: Path) -> None:
    (repository / "cosmos3_pipeline" / "config" / "plugins.py").write_text("import no_such_module\n")
    done = run("diff", cwd=repository)
    assert done.returncode == command.USAGE
    assert "no_such_module" in done.stderr and str(repository) not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(["diff", "no-such-branch"], "no-such-branch", id="no such revision"),
        pytest.param(["diff", "--format", "poem"], "works: cosmos3 diff --format text", id="no such format"),
        pytest.param(["diff", "--fromat=json"], "works: cosmos3 diff --format=json", id="no such flag"),
        pytest.param(["diff", "a", "b", "c"], "works: cosmos3 diff a b\n", id="a word too many"),
        pytest.param(["blame"], "works: cosmos3 blame sampler.steps\n", id="a word is missing"),
        pytest.param(["completion", "zhs"], "works: cosmos3 completion zsh", id="no such shell"),
        pytest.param(["plugins", "--verbose"], "works: cosmos3 plugins\n", id="no flag is near"),
        pytest.param(["diff", "a.yaml"], "compared with another one", id="one file"),
        pytest.param(["diff", "no.yaml", "nope.yaml"], "no.yaml cannot be read", id="no such file"),
        pytest.param(["diff", "--", "a=b"], "two lists", id="one list"),
        pytest.param(["diff", "--", "task.promt=x", "--"], "did you mean task.prompt", id="refused list"),
    ],
)
def test_usage_errors_exit_with_3(pristine: Path, arguments: list[str], says: str) -> None:
    done = run(*arguments, cwd=pristine)
    assert done.returncode == command.USAGE
    assert says in done.stderr


def test_outside_a_repository(tmp_path: Path) -> None:
    done = run("diff", cwd=tmp_path)
    assert done.returncode == command.USAGE
    assert "git repository" in done.stderr


def test_two_lists_of_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    two_ranks = ["topology=cpu_x2"]
    code = command.main(
        ["--format", "json", "--", *two_ranks, "vae=replicated", "--", *two_ranks, "vae=parallel_decode"]
    )
    report = json.loads(capsys.readouterr().out)
    assert code == 1
    (change,) = report["changes"]
    assert change["key"] == "vae.parallel_decode"
    assert change["places"] == [["conf/vae/replicated.yaml"], ["conf/vae/parallel_decode.yaml"]]
    (effect,) = report["effects"]
    assert effect["pixels"] == "same pixels"
    assert effect["cases"]["the run"]["strategy.decode"] == ["replicated", "layer_pipeline"]


def test_two_saved_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cosmos3_pipeline import compose
    from cosmos3_pipeline.config.plain import as_yaml

    for name, overrides in (("a", []), ("b", ["sampler.seed=7"])):
        (tmp_path / f"{name}.yaml").write_text(as_yaml(compose(overrides)))
    code = command.main([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")])
    text = capsys.readouterr().out
    assert code == 1
    assert "another picture (sampler.seed)" in text
    assert command.main([str(tmp_path / "a.yaml"), str(tmp_path / "a.yaml")]) == 0


def test_blame_tells_the_winner_and_what_it_won_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert blame.main(["vae.parallel_decode", "topology=cpu_x2"]) == 0
    first, winner, loser = capsys.readouterr().out.splitlines()
    assert first.startswith("vae.parallel_decode = true   set by conf/vae/parallel_decode.yaml:")
    assert "->" in winner and "chosen by conf/topology/cpu_x2.yaml" in winner
    assert "false" in loser and "conf/vae/replicated.yaml" in loser
    assert blame.main(["sampler.steps"]) == 0
    assert "which refers to model.recommended.video.steps" in capsys.readouterr().out
    assert blame.main(["topology", "topology=cpu_x4"]) == 0
    assert "topology.ulysses = 2" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["sampler.stepz"], ["sampler.steps", "task.promt=x"]])
def test_blame_exits_with_3_where_there_is_nothing_to_tell(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert blame.main(arguments) == blame.USAGE
    said = capsys.readouterr().err
    assert "sampler.steps" in said or "task.prompt" in said


def test_a_sweep_is_planned_before_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["topology=cpu_x2", "vae=replicated,parallel_decode", "sampler.guidance_scale=1.0,6.0"]
    assert sweep_plan.main(["--format", "json", *overrides]) == sweep_plan.INVALID
    jobs = json.loads(capsys.readouterr().out)["jobs"]
    assert [job["overrides"][1:] for job in jobs] == [
        ["vae=replicated", "sampler.guidance_scale=1.0"],
        ["vae=replicated", "sampler.guidance_scale=6.0"],
        ["vae=parallel_decode", "sampler.guidance_scale=1.0"],
        ["vae=parallel_decode", "sampler.guidance_scale=6.0"],
    ]
    assert [job["plan"] is None for job in jobs] == [True, False, True, False]
    assert sweep_plan.main(["--", *overrides]) == sweep_plan.INVALID
    text = capsys.readouterr().out
    assert "refused jobs 0, 2: topology.cfg=2" in text  # the same problem is told once
    assert sweep_plan.main(["--", "sampler.seed=1,2"]) == 0
    assert sweep_plan.main(["--", "nonsense"]) == sweep_plan.USAGE


def test_the_jobs_of_the_preview_are_hydras(tmp_path: Path) -> None:
    """Hydra itself is asked for the same sweep, with a job that does nothing."""
    overrides = ["a=1,2", "b=x", "c=range(0,3)", "d=choice(p,q)"]
    (tmp_path / "config.yaml").write_text("a: 0\nb: 0\nc: 0\nd: 0\n")
    script = tmp_path / "app.py"
    script.write_text(
        "import hydra\nfrom hydra.core.hydra_config import HydraConfig\n"
        "@hydra.main(version_base='1.3', config_path='.', config_name='config')\n"
        "def main(cfg):\n    print('JOB', list(HydraConfig.get().overrides.task))\n"
        "main()\n"
    )
    asked = [sys.executable, str(script), "-m", *overrides, f"hydra.sweep.dir={tmp_path / 'out'}"]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=tmp_path)
    ran = [line.removeprefix("JOB ") for line in done.stdout.splitlines() if line.startswith("JOB ")]
    with BUILTIN.opened() as loader:
        assert ran == [str(job) for job in jobs_of(overrides, loader)]
