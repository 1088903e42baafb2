"""Several prompts in one run: a clip per line, dealt to replicas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import SMALL, launch, metrics


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


@pytest.mark.thorough
def test_a_line_gives_the_clip_that_its_prompt_alone_gives(prompts: Path, tmp_path: Path) -> None:
    launch(
        *SMALL,
        "topology.ranks_per_node=2",
        "topology.dp=2",
        f"task.prompt_file={prompts}",
        f"hydra.run.dir={tmp_path / 'many'}",
    )
    launch(*SMALL, "task.prompt='a blue boat'", f"hydra.run.dir={tmp_path / 'one'}")
    hashes = [metrics(tmp_path / folder)["frames_sha256"] for folder in ("many/line_0003", "one")]
    assert hashes[0] == hashes[1]


def test_replicas_without_prompts_are_refused() -> None:
    done = launch("topology.ranks_per_node=2", "topology.dp=2")
    assert done.returncode == 2
    assert "task.prompt_file" in done.stderr
