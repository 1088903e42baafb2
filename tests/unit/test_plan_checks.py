"""Faults are told all at once, each with its key, its value, who set it and what would work."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosmos3_pipeline import compose
from cosmos3_pipeline.config.shortcut import composition_of
from cosmos3_pipeline.distributed import host
from cosmos3_pipeline.errors import ConfigError, Problem
from cosmos3_pipeline.jobs.start import prepare
from cosmos3_pipeline.planning.fitting import that_fits
from cosmos3_pipeline.planning.plan import make_plan


def refused(*overrides: str) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    return caught.value.problems


def test_several_faults_at_once_each_with_who_set_it() -> None:
    problems = refused(
        "model=nano",
        "topology=h200_x4",
        "task.height=700",
        "task.num_frames=18",
        "topology.ulysses=3",
        "topology.ranks_per_node=90",
        "output.preset=slwo",
    )
    names = ("height", "num_frames", "heads", "preset")
    by_key = {key: p for p in problems for key in names if key in p.what}
    assert set(by_key) == set(names)
    assert any("vae.decode=" in p.what for p in problems)
    assert by_key["height"].set_by == ("task.height by task.height=700",)
    assert by_key["height"].works == "task.height=704"
    assert by_key["preset"].set_by == ("output.preset by output.preset=slwo",)
    for problem in problems:
        assert problem.what and problem.why and problem.works
        assert problem.set_by, problem


def test_a_fault_in_a_file_names_the_file() -> None:
    (problem,) = refused("topology.cfg=2")
    assert "topology.cfg by topology.cfg=2" in problem.set_by
    assert any(origin.startswith("topology.ulysses by conf/topology/cpu_x1.yaml:") for origin in problem.set_by)
    (problem,) = refused("model.recommended.video.height=90")
    assert problem.set_by == ("task.height by model.recommended.video.height=90 (model.recommended.video.height)",)


@pytest.mark.parametrize(
    ("overrides", "what", "works"),
    [
        pytest.param(
            ["topology=cpu_x2", "sampler.guidance_scale=1.0"],
            "topology.cfg=2 with sampler.guidance_scale=1.0",
            "topology.cfg=1",
            id="guidance parallel without guidance",
        ),
        pytest.param(
            ["topology.ranks_per_node=3", "topology.ulysses=3"],
            "topology.ulysses=3 with 8 attention heads",
            "topology.ulysses=2 or topology.ulysses=4",
            id="heads do not divide",
        ),
        pytest.param(
            ["topology=cpu_x4", "topology.cfg=1", "topology.ulysses=1", "topology.cp=[3,1]"],
            "topology.cfg=1 x topology.cp=[3,1] x topology.ulysses=1 on 4 ranks",
            "topology.ranks_per_node=3",
            id="a grid that is not the ranks",
        ),
        pytest.param(
            [
                *("topology=cpu_x4", "topology.cfg=1", "topology.cp=[2,1]", "topology.ulysses=2"),
                *("task=t2i", "task.height=64", "task.width=32"),
            ],
            "topology.cp=[2,1] x topology.ulysses=2 over",
            "topology.cp=[1,1]",
            id="a group without tokens",
        ),
        pytest.param(
            ["topology.cp=[2]"], "topology.cp=[2] has 1 value", "topology.cp with 2 values", id="no columns"
        ),
        pytest.param(["topology.cp=[2,0]"], "topology.cp[1]=0", "topology.cp with 1", id="zero columns"),
        pytest.param(
            ["topology=cpu_x4", "topology.ranks_per_node=100"],
            "vae.decode=LayerPipeline",
            "84 ranks or fewer",
            id="more ranks than the strategy can use",
        ),
        pytest.param(["plan.search=true"], "plan.search=true with job=generate", "job=plan", id="search in a run"),
        pytest.param(
            ["model=nano", "model.trained.when_outside=refuse", "task.height=704"],
            "task.width=1280 x task.height=704 with model=nano",
            "task.width=1280 task.height=720",
            id="untrained size",
        ),
        pytest.param(
            ["model=nano", "model.trained.when_outside=refuse", "task.num_frames=401"],
            "task.num_frames=401",
            "task.num_frames=197",
            id="untrained length",
        ),
        pytest.param(
            ["model.trained.when_outside=refuse", "task.prompt='A red kite flies over a blue background'"],
            "does not know: kite, flies",
            "task.prompt='A large yellow triangle moves up over a purple background.'",
            id="unknown words",
        ),
        pytest.param(
            ["model=nano", "model.trained.when_outside=refuse", "task.fps=25"],
            "task.fps=25",
            "task.fps=24",
            id="untrained rate",
        ),
    ],
)
def test_refused_with_what_works(overrides: list[str], what: str, works: str) -> None:
    problems = refused(*overrides)
    assert any(what in p.what and works in p.works for p in problems), problems


def test_what_works_does_work() -> None:
    for overrides in (
        ["topology=cpu_x2", "sampler.guidance_scale=1.0", "topology.cfg=1"],
        ["topology.ranks_per_node=4", "topology.ulysses=4"],
        ["model=nano", "model.trained.when_outside=refuse", "task.num_frames=197"],
    ):
        compose(overrides)


def test_a_strategy_that_promises_too_little_is_refused() -> None:
    (problem,) = refused("topology=cpu_x2", "vae/decode=spatial_shard", "vae.required_exactness=bitwise")
    assert problem.what == "vae.decode=SpatialShard is rounding with vae.required_exactness=bitwise"
    assert any(origin.startswith("vae.decode by conf/vae") or "_strategy" in origin for origin in problem.set_by)
    assert "vae.required_exactness=rounding" in problem.works
    compose(["topology=cpu_x2", "vae/decode=spatial_shard", "vae.required_exactness=rounding"])
    compose(["vae.required_exactness=bitwise"])  # what is switched off promises nothing and needs not


@pytest.mark.parametrize(
    ("model", "task", "told"),
    [
        ("edge", "t2i", True),
        ("edge", "v2v", True),
        ("edge", "i2v", False),
        ("super", "v2v", True),
        ("nano", "v2v", False),
    ],
)
def test_a_task_that_is_not_supported_on_a_model_warns_or_is_refused(model: str, task: str, told: bool) -> None:
    overrides = [f"model={model}", f"task={task}"]
    warned = [warning for warning in make_plan(compose(overrides)).warnings if f"task={task} with" in warning]
    assert bool(warned) == told
    strict = [*overrides, "model.trained.when_outside=refuse"]
    if told:
        with pytest.raises(ConfigError, match=f"task={task} with model={model}"):
            compose(strict)
    else:
        compose(strict)


def test_words_that_the_toy_does_not_know_are_told_once(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("A large red circle moves up over an orange background at night.\nA KITE\na kite and a dog\n")
    (told,) = make_plan(compose([f"task.prompt_file={file}"])).warnings
    assert told.startswith(f"{file} has words that model=toy does not know: kite, dog: it was trained with red")
    assert (
        make_plan(compose([])).warnings
        == make_plan(compose(["model=toy_random", "task.prompt=kite"])).warnings
        == ()
    )


@pytest.mark.parametrize(("control", "told"), [("edge", False), ("depth", True)])
def test_a_control_that_a_model_was_not_trained_for_is_told(control: str, told: bool) -> None:
    asked = ["task=transfer", f"task.controls.{control}=control.mp4", "task.num_frames=17"]
    said = f"task.controls.{control} with model=toy: the model was trained to follow edge"
    assert any(note.startswith(said) for note in make_plan(compose(asked)).warnings) == told


def test_untrained_sizes_warn_unless_told_otherwise() -> None:
    told = [
        note for note in make_plan(compose(["model=nano", "task.height=704"])).warnings if "not trained" in note
    ]
    assert told and "1280x720" in told[0]
    quiet = make_plan(compose(["model=nano", "task.height=704", "model.trained.when_outside=ignore"]))
    assert not any("not trained" in note for note in quiet.warnings)


def test_memory_that_cannot_fit_stops_a_run_but_not_a_plan() -> None:
    overrides = ["model=super", "topology=l40s_x1", "model.path=nvidia/Cosmos3-Super"]
    assert not make_plan(compose(overrides)).fits
    with pytest.raises(ConfigError) as caught:
        prepare(composition_of(overrides))
    (problem,) = [p for p in caught.value.problems if "needs" in p.what]
    assert "48 GB" in problem.why and "GB of weights" in problem.why
    assert problem.works == "weights=auto"
    assert make_plan(compose([*overrides, "weights=auto"])).fits
    prepare(composition_of([*overrides, "job=plan"]))
    assert make_plan(compose(["model=nano", "topology=h100_x1", "model.path=nvidia/Cosmos3-Nano"])).fits


def test_layers_that_wait_on_the_host_need_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["model=super", "topology=l40s_x4", "weights=streamed", "model.path=nvidia/Cosmos3-Super"]
    monkeypatch.setattr(host, "available_bytes", lambda: 200 * 10**9)
    with pytest.raises(ConfigError, match=r"(?s)wait on this host need 275 GB.*200 GB are free.*weights=sharded"):
        prepare(composition_of(asked), fetch=False)
    monkeypatch.setattr(host, "available_bytes", lambda: 300 * 10**9)
    prepare(composition_of(asked), fetch=False)


def test_what_would_fit_keeps_most_of_the_clip_and_its_ratio() -> None:
    small = compose(["model=nano", "topology=rtx4090_x1", "topology.accelerator.memory_gb=6"])
    said = that_fits(small, 6e9)
    assert said == "weights=auto task.width=832 task.height=480"
    again = compose(["model=nano", "topology=rtx4090_x1", "topology.accelerator.memory_gb=6", *said.split()])
    assert make_plan(again).fits


def test_a_photograph_beside_the_models_own_words_is_told_and_never_refused() -> None:
    asked = ["task=i2v", "task.image=photo.png", "model.trained.when_outside=refuse"]
    (warning,) = make_plan(compose(asked)).warnings
    assert "does not know your task.image" in warning
    assert not make_plan(
        compose([*asked, "task.prompt='A red circle moves left over a blue background.'"])
    ).warnings
