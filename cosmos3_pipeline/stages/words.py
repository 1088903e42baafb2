"""The words that the model is given: the prompt with its numbers filled in, and the checkpoint's negative prompt.

Cosmos3 was trained on captions in JSON. NVIDIA's framework writes size and duration into such a caption; to plain
words it appends sentences that say them, which diffusers does as well.

Source: NVIDIA cosmos-framework `inference/inference.py` and `inference/args.py`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos3_pipeline.checkpoint.files import NEGATIVE_PROMPT
from cosmos3_pipeline.config.schema import TaskConfig
from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.planning.geometry import Clip
from cosmos3_pipeline.planning.text import GIVEN, WORDS_ENCODING, lines_of

# Width over height of each label that NVIDIA's captions have.
ASPECT_RATIOS = {"1,1": 1.0, "4,3": 4 / 3, "3,4": 3 / 4, "16,9": 16 / 9, "9,16": 9 / 16}


@dataclass(frozen=True)
class Words:
    """What the tokenizer is given. `sentences`: whether diffusers appends those on size and duration to both."""

    prompt: str
    negative_prompt: str
    negative_prompt_from: str
    sentences: bool


def words_for(prompt: str, negative_prompt: str | None, *, clip: Clip, fps: float, own: str | None) -> Words:
    """The words for a clip. `negative_prompt` None takes the checkpoint's `own`, or "" where that is None."""
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
    """The caption where `prompt` is one in JSON, else None: a sentence may begin with a brace."""
    if not prompt.lstrip().startswith("{"):
        return None
    try:
        found = json.loads(prompt)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _filled(caption: dict[str, Any], clip: Clip, fps: float) -> dict[str, Any]:
    """The caption with the clip's numbers, over what it says of them itself; an image has no duration."""
    numbers: dict[str, Any] = {}
    if clip.num_frames > 1:
        numbers = {"duration": f"{int(clip.num_frames / fps)}s", "fps": float(fps)}
    else:
        caption = {key: value for key, value in caption.items() if key not in ("duration", "fps")}
    ratio = math.log(clip.width / clip.height)
    label = min(ASPECT_RATIOS, key=lambda name: abs(math.log(ASPECT_RATIOS[name]) - ratio))
    return {**caption, **numbers, "resolution": {"H": clip.height, "W": clip.width}, "aspect_ratio": label}


def prompt_of(task: TaskConfig) -> str:
    """The words of `task.prompt`; a line of a prompt file is words also where it begins with @.

    Raises:
        Refusal: there are none, or their file cannot be read.
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
    """`words`, or what is in the file of `@file`, without the white space around it.

    Raises:
        Refusal: the file is not there or is no UTF-8 text.
    """
    return _text_of(words[1:], named=words).strip() if words.startswith("@") else words


def _text_of(file: str, *, named: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding=WORDS_ENCODING)
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(
            what=f"{named} is not a file of words",
            why=str(error),
            works="a UTF-8 text or JSON file, or the words themselves, in task.prompt without @ in front",
        ) from error


def read_lines(file: str) -> dict[int, str]:
    """The prompts of a prompt file, one per line, by the numbers of their lines from 1; blank lines are none.

    Raises:
        Refusal: the file is not there, is no UTF-8 text, or has no line.
    """
    lines = lines_of(_text_of(file, named=f"task.prompt_file={file}"))
    if not lines:
        raise Refusal(
            what=f"task.prompt_file={file} has no words",
            why="each line is the prompt of one clip",
            works="a text file with one prompt per line",
        )
    return lines
