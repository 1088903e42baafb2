"""The words that the model gets: the prompt with its numbers filled in, and the checkpoint's negative prompt.

Cosmos3 was trained on captions in JSON. NVIDIA's framework writes size and duration into a JSON caption. To plain
words it appends sentences with size and duration; diffusers appends them too.

Source: NVIDIA cosmos-framework `inference/inference.py` and `inference/args.py`.
"""

from __future__ import annotations

import json
import math
import shlex
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos3_pipeline.checkpoint.files import NEGATIVE_PROMPT
from cosmos3_pipeline.config.schema import TaskConfig
from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.planning.geometry import Clip
from cosmos3_pipeline.planning.text import GIVEN, WORDS_ENCODING, lines_of

# Width over height of each aspect label in NVIDIA's captions.
ASPECT_RATIOS = {"1,1": 1.0, "4,3": 4 / 3, "3,4": 3 / 4, "16,9": 16 / 9, "9,16": 9 / 16}


@dataclass(frozen=True)
class Words:
    """The words for the tokenizer. `sentences`: whether diffusers appends size and duration to both prompts."""

    prompt: str
    negative_prompt: str
    negative_prompt_from: str
    sentences: bool


def words_for(prompt: str, negative_prompt: str | None, *, clip: Clip, fps: float, own: str | None) -> Words:
    """The words for a clip. If `negative_prompt` is None, the checkpoint's `own` is taken, or "" without one."""
    caption = _caption(prompt)
    source = GIVEN
    if negative_prompt is None:
        negative_prompt, source = "", "none, because the checkpoint has none"
        if own is not None:
            negative_prompt, source = own, f"the checkpoint's {NEGATIVE_PROMPT}"
    return Words(
        prompt=prompt if caption is None else json.dumps(_filled(caption, clip, fps)),
        negative_prompt=negative_prompt,
        negative_prompt_from=source,
        sentences=caption is None,
    )


def _caption(prompt: str) -> dict[str, Any] | None:
    """The caption if `prompt` is a JSON object, else None. A sentence that begins with a brace is no caption."""
    if not prompt.lstrip().startswith("{"):
        return None
    try:
        found = json.loads(prompt)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _filled(caption: dict[str, Any], clip: Clip, fps: float) -> dict[str, Any]:
    """The caption with the clip's numbers, which replace numbers of its own. An image has no duration."""
    numbers: dict[str, Any] = {}
    if clip.num_frames > 1:
        numbers = {"duration": f"{int(clip.num_frames / fps)}s", "fps": float(fps)}
    else:
        caption = {key: value for key, value in caption.items() if key not in ("duration", "fps")}
    ratio = math.log(clip.width / clip.height)
    label = min(ASPECT_RATIOS, key=lambda name: abs(math.log(ASPECT_RATIOS[name]) - ratio))
    return {**caption, **numbers, "resolution": {"H": clip.height, "W": clip.width}, "aspect_ratio": label}


def prompt_of(task: TaskConfig) -> str:
    """The words of `task.prompt`. In a prompt file a line that begins with @ is words, not the name of a file.

    Raises:
        Refusal: the prompt is empty, or its file cannot be read.
    """
    prompt = read_words(task.prompt) if task.prompt_file is None else task.prompt
    if not prompt.strip():
        raise Refusal(
            what=f"the prompt is empty{f' ({task.prompt[1:]})' if task.prompt else ''}",
            why="the model is told what to show by words only",
            works="task.prompt='a red kite', or task.prompt=@FILE with words in the file",
        )
    return prompt


def read_words(words: str) -> str:
    """`words`. If they are `@file`, the text of that file without the white space around it.

    Raises:
        Refusal: the file does not exist, is no UTF-8 text, or holds NUL.
    """
    return _text_of(words[1:], named=words).strip() if words.startswith("@") else words


def _text_of(file: str, *, named: str) -> str:
    path, what = Path(file).expanduser(), f"{named} is not a file of words"
    in_utf16 = f"if it is in UTF-16: iconv -f UTF-16 -t UTF-8 {shlex.quote(str(path))} > words.txt"
    try:
        text = path.read_text(encoding=WORDS_ENCODING)
    except (OSError, UnicodeDecodeError) as error:
        works = "a UTF-8 text or JSON file, or the words themselves, in task.prompt without @ in front"
        content = error.object if isinstance(error, UnicodeDecodeError) else b""
        if b"\0" in content or content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
            works = in_utf16
        raise Refusal(what, str(error), works) from error
    if "\0" in text:  # UTF-16 without a byte order mark decodes as UTF-8
        raise Refusal(what, "it holds the character NUL, which no text has", in_utf16)
    return text


def read_lines(file: str) -> dict[int, str]:
    """The prompts of a prompt file by line number, from 1. Each line is a prompt; blank lines are skipped.

    Raises:
        Refusal: the file does not exist, is no UTF-8 text, or has only blank lines.
    """
    lines = lines_of(_text_of(file, named=f"task.prompt_file={file}"))
    if not lines:
        raise Refusal(
            what=f"task.prompt_file={file} has no words",
            why="each line is the prompt of one clip",
            works="a text file with one prompt per line",
        )
    return lines
