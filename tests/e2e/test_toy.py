"""The trained toy shows what is said, by the statistics of its pixels: `examples/train_toy/judge.py` on ten."""

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
PROMPTS = 10
# Shapes are what the toy is worst at, see docs/toy.md.
SHAPES = {"t2v": 9, "t2i": 8, "i2v": 8, "v2v": 8}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, tuple[int, int]], list[Tensor]]:
    """The clips of ten prompts that no training has seen, of a task and a size."""

    @cache
    def make(task: str, size: tuple[int, int]) -> list[Tensor]:
        folder = tmp_path_factory.mktemp("toy")
        return judge.make(task, judge.unseen(PROMPTS), folder, size, ["topology.threads_per_rank=1"])

    return make


@pytest.mark.parametrize(
    ("task", "size"),
    [("t2v", (96, 160)), ("t2v", (96, 96)), ("t2i", (160, 160)), ("i2v", (96, 160)), ("v2v", (96, 160))],
)
def test_ten_prompts(task: str, size: tuple[int, int], made: Callable[..., list[Tensor]]) -> None:
    right = dict.fromkeys(QUESTIONS, 0)
    for scene, clip in zip(judge.unseen(PROMPTS), made(task, size), strict=True):
        assert clip.shape == (3, judge.FRAMES[task], *size)
        for question, yes in answers(clip, scene).items():
            right[question] += yes
    assert right["colour"] >= 9 and right["background"] >= 9, right
    assert right["direction"] >= 9, right
    assert right["shape"] >= SHAPES[task], right


def test_another_prompt_is_another_clip(made: Callable[..., list[Tensor]]) -> None:
    """That the answers can be wrong: the clips of ten prompts, asked for ten others."""
    asked = zip(made("t2v", (96, 160)), judge.unseen(PROMPTS, seed=1), strict=True)
    right = [answers(clip, other) for clip, other in asked if len(other.things) == 1]
    assert sum(all(found.values()) for found in right) <= 1
