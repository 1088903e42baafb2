"""The trained toy shows what is said, by the statistics of its pixels: `examples/train_toy/judge.py` on a few."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "train_toy"))

import judge
from look import QUESTIONS, answers

pytestmark = pytest.mark.ranks
# Prompts of one file are one run; a picture or a clip to begin from is a run each.
PROMPTS = {"t2v": 6, "t2i": 10, "i2v": 5, "v2v": 5}
# The number of wrong shapes that is allowed. The toy is worst at shapes, see docs/toy.md.
WRONG_SHAPES = {"t2v": 1, "t2i": 2, "i2v": 1, "v2v": 1}

# The correlation of pitch and height, pixels from the path of the edges, and dB of the last frame.
FOLLOWS, PATH_OFF, LAST_DB = 0.9, 5.0, 25.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, tuple[int, int]], list[Tensor]]:
    """The clips of prompts that no training has seen, of a task and a size."""

    @cache
    def make(task: str, size: tuple[int, int]) -> list[Tensor]:
        folder = tmp_path_factory.mktemp("toy")
        return judge.make(task, judge.unseen(PROMPTS[task]), folder, size, ["topology.threads_per_rank=1"])

    return make


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("task", "size"),
    [("t2v", (96, 160)), ("t2v", (96, 96)), ("t2i", (160, 160)), ("i2v", (96, 160)), ("v2v", (96, 160))],
)
def test_prompts(task: str, size: tuple[int, int], made: Callable[..., list[Tensor]]) -> None:
    right = dict.fromkeys(QUESTIONS, 0)
    for scene, clip in zip(judge.unseen(PROMPTS[task]), made(task, size), strict=True):
        assert clip.shape == (3, judge.FRAMES[task], *size)
        for question, yes in answers(clip, scene).items():
            right[question] += yes
    assert min(right["colour"], right["background"], right["direction"]) >= PROMPTS[task] - 1, right
    assert right["shape"] >= PROMPTS[task] - WRONG_SHAPES[task], right


@pytest.mark.parametrize("task", ["sound", "transfer", "flf2v"])
def test_what_only_some_tasks_show(task: str, tmp_path: Path) -> None:
    scene = judge.unseen(1)[0]
    assert scene.things[0].way == "down"
    (clip,) = judge.make(task, [scene], tmp_path, (96, 160), ["topology.threads_per_rank=1"])
    if task == "sound":
        (file,) = tmp_path.glob("line_*/sound.wav")
        assert judge.pitch_follows(clip, scene, judge.tones_of(judge.heard(file))) > FOLLOWS
    elif task == "transfer":
        assert judge.off_path(clip, scene).mean() < PATH_OFF
    else:
        assert judge.of_last(clip, scene) > LAST_DB


def test_another_prompt_is_another_clip(made: Callable[..., list[Tensor]]) -> None:
    """That the answers can be wrong: the clips of some prompts, asked for others."""
    asked = zip(made("t2v", (96, 160)), judge.unseen(PROMPTS["t2v"], seed=1), strict=True)
    right = [answers(clip, other) for clip, other in asked if len(other.things) == 1]
    assert sum(all(found.values()) for found in right) <= 1
