"""The words that the model is given: NVIDIA's numbers in a caption, the checkpoint's negative prompt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import make_layout
from toy_runs import clip_of, task_config

from cosmos3_pipeline import compose
from cosmos3_pipeline.checkpoint.inspect import inspect_checkpoint
from cosmos3_pipeline.config.compose import Composition
from cosmos3_pipeline.config.plain import as_yaml
from cosmos3_pipeline.config.shortcut import composition_of
from cosmos3_pipeline.errors import ConfigError, Refusal
from cosmos3_pipeline.jobs import prompts
from cosmos3_pipeline.jobs.start import prepare
from cosmos3_pipeline.planning.geometry import Clip
from cosmos3_pipeline.planning.text import LONGEST_TEXT, prompts_of
from cosmos3_pipeline.stages.words import Words, prompt_of, read_lines, read_words, words_for

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


@pytest.mark.long
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


# Prompts with characters that have a meaning to OmegaConf, to `@file` or to a table.
AWKWARD = [
    "kite ${oc.env:HOME}",
    "costs ${100}",
    "???",
    "@/etc/hostname",
    "a [/bold] kite",
    r"a \${b} \\${c}",
    "x\\",
]


def test_lines_of_a_file_are_words(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbf\r\n" + "\r\n\r\n".join(AWKWARD).encode() + b"\r\n\r\n")
    lines = read_lines(str(file))
    assert lines == dict(zip(range(2, 16, 2), AWKWARD, strict=True))
    for line in lines.values():
        assert prompt_of(task_config(prompt=line, prompt_file=str(file))) == line
    file.write_bytes(b"\xef\xbb\xbfa kite\n")
    assert read_words(f"@{file}") == "a kite"
    file.write_bytes(b"\xef\xbb\xbf\n")
    with pytest.raises(Refusal, match="has no words"):
        read_lines(str(file))


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        pytest.param(b"a\nb\n", {1: "a", 2: "b"}, id="LF"),
        pytest.param(b"a\r\nb\r\n", {1: "a", 2: "b"}, id="CRLF"),
        pytest.param(b"a\rb\r", {1: "a", 2: "b"}, id="CR"),
        pytest.param(b"a\rb\r\n\nc\n\rd", {1: "a", 2: "b", 4: "c", 6: "d"}, id="mixed, no end"),
        pytest.param("a\u2028b\x85c\nd".encode(), {1: "a\u2028b\x85c", 2: "d"}, id="separators of Unicode"),
        pytest.param(b"a\x0cb\x0bc\x1cd\n", {1: "a\x0cb\x0bc\x1cd"}, id="form feed"),
    ],
)
def test_line_ends_of_every_system_end_a_prompt(content: bytes, lines: dict[int, str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    assert read_lines(str(tmp_path / "prompts.txt")) == lines
    assert prompts_of(task_config(prompt_file=str(tmp_path / "prompts.txt"))) == [*lines.values()]


@pytest.mark.parametrize("words", [each for each in AWKWARD if each != "???"])
def test_words_that_were_interpolated_once_are_not_a_second_time(words: str, tmp_path: Path) -> None:
    config = compose([])
    config = replace(config, task=replace(config.task, prompt=words))
    (tmp_path / "config.yaml").write_text(as_yaml(config), encoding="utf-8")
    for again in (Composition.of_file(tmp_path / "config.yaml"), Composition.of_saved(config)):
        assert again.typed().task.prompt == words


def test_the_closing_table_shows_any_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for number, line in enumerate(AWKWARD, 1):
        found[number] = prompts.PromptLine(number, line, f"line_{number:04d}", f"[/dim] {line}")
    prompts.write_index(tmp_path, found)
    with pytest.raises(prompts.PromptsFailed):
        prompts.show(tmp_path)
    assert "a [/bold] kite" in capsys.readouterr().out


GIVEN_FILES = ("task.prompt=@{}", "task.negative_prompt=@{}", "task.prompt_file={}")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
@pytest.mark.parametrize("given", GIVEN_FILES)
def test_a_file_that_is_no_text_is_refused_before_anything_starts(
    given: str, encoding: str, tmp_path: Path
) -> None:
    (tmp_path / "words.txt").write_bytes("ein grüner Drachen".encode(encoding))
    works = "UTF-8 text" if encoding == "latin-1" else "iconv -f UTF-16"
    with pytest.raises(ConfigError, match=f"not a file of words[\\s\\S]*works: .*{works}"):
        prepare(composition_of([given.format(tmp_path / "words.txt")]))


@pytest.mark.parametrize("start", ["", '{"scene": "'])
@pytest.mark.parametrize("given", GIVEN_FILES)
def test_a_text_that_no_model_was_trained_with_is_refused(given: str, start: str, tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text(f"{start}{'a' * (LONGEST_TEXT - len(start))}")
    compose([given.format(file)])
    file.write_text(f"kite\n{start}{'a' * 20 * LONGEST_TEXT}\n")
    with pytest.raises(ConfigError, match="has more than 65536 characters") as caught:
        compose([given.format(file)])
    assert str(caught.value).startswith("line 2 of" if "prompt_file" in given else given.format(file))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("topology", ["cpu_x1", "cpu_x2"])
def test_a_picture_that_is_none_is_refused_before_anything_starts(topology: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"words")
    with pytest.raises(ConfigError, match="is not a picture"):
        prepare(composition_of(["task=i2v", f"topology={topology}", f"task.image={tmp_path / 'a.png'}"]))
