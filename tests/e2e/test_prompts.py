"""Several prompts in one run: a clip per line, dealt to replicas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL, launch, make_clip, make_photo, metrics
from safetensors.torch import load_file


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red kite\n\na blue boat\na green hill\n")
    return path


@pytest.mark.sampled(1)
@pytest.mark.parametrize("axes", [["topology=cpu_x1"], ["topology.ranks_per_node=3", "topology.dp=3"]], ids=str)
def test_a_clip_per_line_by_the_lines_number_in_the_file(axes: list[str], prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = launch(*SMALL, *axes, f"task.prompt_file={prompts}", f"hydra.run.dir={output}")
    assert done.returncode == 0, done.stderr
    lines = json.loads((output / "prompts.json").read_text())["lines"]
    assert [line["number"] for line in lines] == [1, 3, 4]  # a blank line is none
    assert all(line["failed"] is None for line in lines)
    hashes = {metrics(output / f"line_{n:04d}")["frames_sha256"] for n in (1, 3, 4)}
    assert len(hashes) == 3
    assert not (output / "line_0002").exists()


SIZE = ("task.height=80", "task.width=96")
TOY = ("model=toy_random", "sampler.steps=2")
TASKS = {
    "t2v": SMALL,
    "sound": (*SMALL, "task.sound=true"),
    "policy": (*TOY, "task=policy", "task.image={photo}", "task.domain=bridge_orig_lerobot", "task.chunk_size=8"),
    "transfer": (*TOY, "task=transfer", "task.controls.edge={clip}", "task.num_video_frames_per_chunk=5", *SIZE),
}


@pytest.mark.thorough
@pytest.mark.parametrize("task", TASKS)
def test_a_line_gives_the_clip_that_its_prompt_alone_gives(task: str, prompts: Path, tmp_path: Path) -> None:
    files = {"photo": make_photo(tmp_path / "photo.png"), "clip": make_clip(tmp_path / "clip.mp4")}
    given = [one.format(**files) for one in TASKS[task]]
    given += ["output.latents=true"]
    many = ["topology.ranks_per_node=2", "topology.dp=2", f"task.prompt_file={prompts}"]
    for name, others in (("many", many), ("one", ["task.prompt='a blue boat'"])):
        done = launch(*given, *others, f"hydra.run.dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
    line, alone = tmp_path / "many" / "line_0003", tmp_path / "one"
    found, expected = (load_file(folder / "latents.safetensors") for folder in (line, alone))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    other = load_file(tmp_path / "many" / "line_0001" / "latents.safetensors")
    assert not torch.equal(found["latents"], other["latents"])
    assert (line / "actions.json").exists() == (task == "policy")
    if task == "policy":
        assert (line / "actions.json").read_text() == (alone / "actions.json").read_text()


def test_replicas_without_prompts_are_refused() -> None:
    done = launch("topology.ranks_per_node=2", "topology.dp=2")
    assert done.returncode == 2
    assert "task.prompt_file" in done.stderr
