"""Everything that ships is rehearsed small: what is found in conf/ and in examples/, without a list of it here."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import av
import pytest
from limits import HANGS
from options import ACTION_TASKS, TASK_NEEDS
from PIL import Image

from cosmos3_pipeline import compose
from cosmos3_pipeline.jobs.rehearse.rank import rehearse_ranks
from cosmos3_pipeline.rehearsal.findings import Rehearsed
from cosmos3_pipeline.vae.of_diffusers import OfDiffusers

pytestmark = pytest.mark.long
REPOSITORY = Path(__file__).parents[2]
CONF = REPOSITORY / "conf"
# Pixels of a tile, and from one to the next: tiles of the default size are larger than the toy's picture.
TILE, STRIDE = 64, 48
SMALL = ("model=toy", "sampler.steps=2")


def options(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def given_to(task: str, folder: Path) -> list[str]:
    """A photograph or a clip for the tasks that go on from one, and few frames for those that make several."""
    if task == "t2i":
        return []
    if task in ACTION_TASKS:
        return [
            "task.domain=av",
            "task.chunk_size=8",
            "sampler.guidance_scale=3.0",
            *given_to_actions(task, folder),
        ]
    short = ["task.num_frames=5"]
    if task == "i2v":
        Image.new("RGB", (160, 96), "red").save(folder / "photo.png")
        return [*short, f"task.image={folder / 'photo.png'}"]
    if task == "flf2v":
        Image.new("RGB", (160, 96), "red").save(folder / "photo.png")
        photo = folder / "photo.png"
        return ["task.num_frames=9", f"task.image={photo}", f"task.last_image={photo}"]
    if task == "v2v":
        return ["task.num_frames=9", f"task.video={clip_of_frames(folder, 5)}"]
    if task.startswith("transfer"):
        chunks = ["task.num_frames=9", "task.num_video_frames_per_chunk=5"]
        return [*chunks, f"task.controls.edge={clip_of_frames(folder, 9)}", "task.resample=false"]
    return short


def clip_of_frames(folder: Path, frames: int) -> Path:
    with av.open(str(folder / "clip.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=24, width=160, height=96)
        for _ in range(frames):
            file.mux(stream.encode(av.VideoFrame(160, 96, "rgb24")))
        file.mux(stream.encode())
    return folder / "clip.mp4"


def given_to_actions(task: str, folder: Path) -> list[str]:
    if task == "inverse_dynamics":
        _, clip = given_to("v2v", folder)
        return [clip, "task.resample=false", "task.chunk_size=4"]
    _, photo = given_to("i2v", folder)
    (folder / "actions.json").write_text(json.dumps([[0.5] * 9] * 24))  # three chunks
    return [photo, *([f"task.actions={folder / 'actions.json'}"] if task == "forward_dynamics" else [])]


def in_tiles(vae: str) -> list[str]:
    """Two tiles for two ranks: the toy's picture is smaller than one of those that a real model is given."""
    if "tiled" not in vae:
        return []
    direction = vae.partition("/")[2].partition("=")[0] or "decode"
    sizes = {"min": TILE, "stride": STRIDE}
    return [
        f"vae.{direction}.tile_sample_{what}_{side}={size}"
        for (what, size), side in itertools.product(sizes.items(), ("height", "width"))
    ]


def check(overrides: list[str], ranks: list[int] | None = None) -> Rehearsed:
    small = SMALL[1:] if any(one.startswith("model=") for one in overrides) else SMALL
    found = rehearse_ranks(compose([*small, *overrides]), ranks)
    assert found.findings == ()
    return found


@pytest.mark.parametrize("experiment", options("experiment"))
def test_an_experiment_small(experiment: str) -> None:
    check([f"experiment={experiment}", "topology=cpu_x4"])


def every_two() -> list[Any]:
    """(task, vae, weights): every option beside every option of another group, and not all three with all."""
    weights = options("weights")
    rehearsed = [option for option in options("vae") if option != OfDiffusers.name]  # which a rehearsal refuses
    pairs = itertools.product(enumerate(options("task")), enumerate(rehearsed))
    return [
        pytest.param(
            *(task, vae, weights[(row + column) % len(weights)]),
            marks=[pytest.mark.thorough] * bool((row + column) % 3),
        )
        for (row, task), (column, vae) in pairs
    ]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("task", "vae", "weights"), every_two())
def test_a_task_with_a_vae_and_weights(task: str, vae: str, weights: str, tmp_path: Path) -> None:
    chosen = [*TASK_NEEDS.get(task, []), f"task={task}", "topology=cpu_x2", f"vae={vae}", f"weights={weights}"]
    tiles = in_tiles(f"vae={vae}") if task != "inverse_dynamics" else []  # which decodes nothing
    check([*chosen, *given_to(task, tmp_path), *tiles])


@pytest.mark.thorough
@pytest.mark.parametrize("cache", ["none", "seacache"])
def test_transfer_with_a_rank_for_each_pass(cache: str, tmp_path: Path) -> None:
    chosen = ["task=transfer", "topology=cpu_x1", "topology.ranks_per_node=3", "topology.cfg=3", "sampler.steps=5"]
    chosen += ["task.control_guidance_interval=[0,950]", f"sampler/cache={cache}"]
    check([*chosen, *given_to("transfer", tmp_path)])


@pytest.mark.sampled(1)
@pytest.mark.parametrize("strategy", options("vae/decode"))
def test_a_strategy_of_decode(strategy: str) -> None:
    chosen = ["topology=cpu_x2", f"vae/decode={strategy}", "vae.required_exactness=approximate"]
    check([*chosen, *in_tiles(f"vae/decode={strategy}")])


@pytest.mark.sampled(1)
@pytest.mark.parametrize("strategy", options("vae/encode"))
def test_a_strategy_of_encode(strategy: str, tmp_path: Path) -> None:
    chosen = ["task=v2v", "topology=cpu_x2", "vae=parallel", f"vae/encode={strategy}"]
    chosen += ["vae.required_exactness=approximate", *in_tiles(f"vae/encode={strategy}")]
    check([*chosen, *given_to("v2v", tmp_path)])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("topology", options("topology"))
def test_a_topology(topology: str) -> None:
    """A rehearsal of more than eight ranks takes one of each kind. This test takes ranks 0 and 1."""
    chosen = [f"topology={topology}", "task.num_frames=17"]
    many = compose([*SMALL, *chosen]).topology
    check(chosen, ranks=[0, 1] if many.nodes * many.ranks_per_node > 8 else None)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("model", options("model"))
def test_a_model_makes_an_image(model: str) -> None:
    """At its own size, because that takes no longer."""
    chosen = [f"model={model}", "task=t2i", "topology=h200_x1"]
    if compose(chosen).model.distilled_sigmas is None:
        chosen.append("sampler.steps=2")
    found = rehearse_ranks(compose(chosen), None)
    assert found.findings == ()


@pytest.mark.thorough
def test_the_experiment_of_sglang_at_full_size() -> None:
    found = rehearse_ranks(compose(["experiment=sglang_27037"]), [0])
    assert found.findings == ()
    (rank,) = found.ranks
    planned = found.plan.ranks[0].stages
    for name, stage in rank.stages.items():
        assert stage.flops == pytest.approx(planned[name].flops, rel=0.001)
        assert stage.peak_bytes == pytest.approx(planned[name].peak_bytes, rel=0.02)
    # The plan's seconds contain efficiencies that published runs have shown. The roofline has none.
    assert 0.5 < rank.stages["denoise"].roofline_seconds / planned["denoise"].total_seconds < 1


# ------------------------------------------------------------ a third party's strategies
def installed(example: Path, into: Path) -> dict[str, str]:
    """The environment of a process in which `example` is installed, by what an installer writes into `into`."""
    project = tomllib.loads((example / "pyproject.toml").read_text())["project"]
    folder = into / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    folder.mkdir()
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (folder / "METADATA").write_text(head)
    points = [
        f"[{group}]\n" + "\n".join(f"{name} = {value}" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (folder / "entry_points.txt").write_text("\n".join(points))
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(into), str(example)])}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("example", "command"),
    [
        pytest.param(
            "wavefront",
            ["launch.py", "topology=cpu_x2", "vae/decode=wavefront", "task.num_frames=17", *SMALL],
            id="wavefront",
        ),
        pytest.param("downstream", ["-m", "kite_films.make"], id="columns"),
    ],
)
def test_a_strategy_of_a_third_party(example: str, command: list[str], tmp_path: Path) -> None:
    environment = installed(REPOSITORY / "examples" / example, tmp_path)
    done = subprocess.run(
        [
            sys.executable,
            *command,
            "job=rehearse",
            "rehearse.format=markdown",
            f"hydra.run.dir={tmp_path / 'out'}",
        ],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "2 of 2 ranks: as planned" in done.stdout
