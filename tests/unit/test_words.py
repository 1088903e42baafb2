"""The words that the model is given: NVIDIA's numbers in a caption, the checkpoint's negative prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import make_layout
from toy_runs import clip_of

from cosmos3_pipeline.checkpoint.inspect import inspect_checkpoint
from cosmos3_pipeline.planning.geometry import Clip
from cosmos3_pipeline.stages.words import Words, words_for

CLIP = clip_of(720, 1280, 189)


def words(prompt: str, negative: str | None = "", *, clip: Clip = CLIP, own: str | None = None) -> Words:
    return words_for(prompt, negative, clip=clip, fps=24.0, own=own)


def test_a_caption_gets_the_numbers_of_the_clip_as_nvidia_writes_them() -> None:
    """Keys that are there keep their place and lose their value; new ones follow in this order."""
    given = words('{"subjects": ["a kite"], "fps": 30, "temporal_caption": "it \u2014 turns"}')
    assert given.prompt == (
        '{"subjects": ["a kite"], "fps": 24.0, "temporal_caption": "it \\u2014 turns", "duration": "7s", '
        '"resolution": {"H": 720, "W": 1280}, "aspect_ratio": "16,9"}'
    )
    assert not given.sentences


def test_an_image_has_no_duration() -> None:
    given = words('{"duration": "7s", "fps": 24, "scene": "a coast"}', clip=clip_of(960, 960, 1))
    assert json.loads(given.prompt) == {
        "scene": "a coast",
        "resolution": {"H": 960, "W": 960},
        "aspect_ratio": "1,1",
    }


@pytest.mark.parametrize(
    ("height", "width", "label"),
    [
        (480, 832, "16,9"),
        (832, 480, "9,16"),
        (544, 736, "4,3"),
        (736, 544, "3,4"),
        (640, 640, "1,1"),
        (80, 96, "4,3"),
    ],
)
def test_the_label_of_a_size_is_the_nearest(height: int, width: int, label: str) -> None:
    assert json.loads(words("{}", clip=clip_of(height, width, 5)).prompt)["aspect_ratio"] == label


@pytest.mark.parametrize(
    "prompt", ["a red kite", "{not json", "[1, 2]", '"a string"', "{" * 5000, '{"a": ' + "9" * 5000 + "}"]
)
def test_plain_words_stay_as_they_are_and_get_sentences(prompt: str) -> None:
    assert words(prompt) == Words(prompt, "", "task.negative_prompt", sentences=True)


def test_the_negative_prompt_is_the_checkpoints_own(tmp_path: Path) -> None:
    """The whole object, written by json.dumps as NVIDIA's framework writes it."""
    folder = make_layout(tmp_path / "nano", "nano")
    content = '{"lighting":"flat",  "artistic_style": "none \u2014 at all"}'
    (folder / "assets" / "negative_prompt.json").write_text(content, encoding="utf-8")
    given = words("a kite", None, own=inspect_checkpoint(folder).negative_prompt)
    assert given.negative_prompt == '{"lighting": "flat", "artistic_style": "none \\u2014 at all"}'
    assert given.negative_prompt_from == "the checkpoint's assets/negative_prompt.json"
    assert given.sentences


def test_the_empty_negative_prompt_stays_possible() -> None:
    assert words("a kite", "", own='{"lighting": "flat"}').negative_prompt == ""


def test_a_checkpoint_without_one_has_an_empty_one() -> None:
    given = words("a kite", None, own=None)
    assert (given.negative_prompt, given.negative_prompt_from) == ("", "none, because the checkpoint has none")
